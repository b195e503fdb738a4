//! Names for translated code, for `perf`: a file of lines `start length name`.
//!
//! perf reads `/tmp/perf-PID.map` for anonymous executable memory (its documentation
//! of JIT interfaces), which is why the code cache is no named file. One map serves
//! the whole process. Blocks of one guest function that lie next to each other become
//! one entry. What was overwritten after a flush of the code cache keeps its lines.
use bunshin_core::{EngineError, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

static ON: AtomicBool = AtomicBool::new(false);
static MAP: Mutex<Option<Map>> = Mutex::new(None);

struct Map {
    out: BufWriter<File>,
    /// Guest symbols by address.
    symbols: Vec<(u64, String)>,
    /// Not written yet, since the next block may belong to it; of cold code likewise.
    last: [Option<Entry>; 2],
}

struct Entry {
    start: u64,
    end: u64,
    name: String,
}

fn map() -> MutexGuard<'static, Option<Map>> {
    MAP.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Write the map of this process to `path` from now on; `symbols` name supervisor code.
pub fn start(path: &Path, mut symbols: Vec<(u64, String)>) -> Result<()> {
    // The place is a public one: whatever lies there is replaced, never followed.
    let made = match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => OpenOptions::new().write(true).create_new(true).custom_flags(libc::O_CLOEXEC).open(path),
    };
    let file = made.map_err(|e| EngineError::new("perf-map", format!("{}: {e}", path.display())))?;
    symbols.sort();
    *map() = Some(Map { out: BufWriter::with_capacity(1 << 16, file), symbols, last: [None, None] });
    ON.store(true, Ordering::Release);
    Ok(())
}

/// Whether translations are to be told.
#[inline]
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Host code of these addresses and lengths was made of the guest code at `rip`: what
/// runs often, then the rest, which grows downwards.
pub fn block(parts: [(u64, u64); 2], rip: u64, user: bool) {
    if let Some(map) = &mut *map() {
        let name = map.name(rip, user);
        for (n, (start, length)) in parts.into_iter().enumerate().filter(|p| p.1 .1 > 0) {
            map.add(n, start, length, name.clone());
        }
    }
}

/// Host code of our own.
pub fn own(start: u64, length: u64, name: &str) {
    if let Some(map) = &mut *map() {
        map.add(0, start, length, format!("[bunshin] {name}"));
    }
}

/// Bring the file up to date. A full disk is no reason to stop a guest.
pub fn flush() {
    if let Some(map) = &mut *map() {
        map.write_last();
        let _ = map.out.flush();
    }
}

impl Map {
    /// `guest:function` where a symbol is known, else the page: blocks of it go together.
    fn name(&self, rip: u64, user: bool) -> String {
        if user {
            return format!("user:{:#x}", rip & !0xfff);
        }
        let at = self.symbols.partition_point(|s| s.0 <= rip);
        match at.checked_sub(1).map(|at| &self.symbols[at]) {
            // The last symbol has no end: what lies far behind it is something else.
            Some((from, name)) if at < self.symbols.len() || rip - from < 0x1_0000 => format!("guest:{name}"),
            _ => format!("guest:{:#x}", rip & !0xfff),
        }
    }

    fn add(&mut self, part: usize, start: u64, length: u64, name: String) {
        if let Some(last) = self.last[part].as_mut().filter(|last| last.name == name) {
            // Blocks are aligned to 16 bytes.
            if start >= last.end && start - last.end < 16 {
                last.end = start + length;
                return;
            }
            if start + length == last.start {
                last.start = start;
                return;
            }
        }
        self.write(part);
        self.last[part] = Some(Entry { start, end: start + length, name });
    }

    fn write(&mut self, part: usize) {
        if let Some(Entry { start, end, name }) = self.last[part].take() {
            let _ = writeln!(self.out, "{start:x} {:x} {name}", end - start);
        }
    }

    fn write_last(&mut self) {
        for part in 0..self.last.len() {
            self.write(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_perf_reads_them() {
        let path = std::env::temp_dir().join(format!("bunshin-perf-map-test-{}", std::process::id()));
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        let kernel = 0xffff_ffff_8100_0000;
        start(&path, vec![(kernel + 0x40, "second".into()), (kernel, "first".into())]).unwrap();
        own(0x1000, 0x10, "enter");
        block([(0x2000, 0x15), (0x9f00, 0x100)], kernel, false);
        // next to it, the same function
        block([(0x2020, 0x10), (0x9ee0, 0x20)], kernel + 0x3f, false);
        block([(0x2030, 0x10), (0x9ee0, 0)], kernel + 0x40, false);
        // the same function, elsewhere
        block([(0x3000, 0x10), (0x9ed0, 0x10)], kernel + 0x50, false);
        block([(0x4000, 8), (0x9ed0, 0)], kernel - 1, false);
        block([(0x5000, 8), (0x9ed0, 0)], kernel + 0x2_0000, false);
        block([(0x6000, 8), (0x9ed0, 0)], 0x55_1234, true);
        flush();
        let text = fs::read_to_string(&path).unwrap();
        assert!(!fs::symlink_metadata(&path).unwrap().is_symlink());
        fs::remove_file(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "1000 10 [bunshin] enter",
                "2000 30 guest:first",
                "2030 10 guest:second",
                "9ee0 120 guest:first",
                "3000 10 guest:second",
                "4000 8 guest:0xffffffff80fff000",
                "5000 8 guest:0xffffffff81020000",
                "6000 8 user:0x551000",
                "9ed0 10 guest:second",
            ]
        );
    }
}
