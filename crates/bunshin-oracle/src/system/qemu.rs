//! QEMU's translator as a machine: a process whose memory is a file that we
//! map too, so that batches and logs need no protocol. It boots a few bytes of
//! our own instead of a firmware; a reset comes through them again.
use super::harness;
use super::layout::*;
use super::machine::{word, Machine};
use crate::processor_time;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How much of a processor's time one case may take.
const PATIENCE: Duration = Duration::from_millis(1500);

/// A processor as much like the translator's as this QEMU can be.
const CPU: &str = "max,vendor=AuthenticAMD,phys-bits=46,la57=off,pku=off,pks=off,svm=off,mce=off,monitor=off";

/// A running QEMU.
pub struct Qemu {
    child: Child,
    ram: *mut u8,
    folder: PathBuf,
}

/// What stands at the processor's first instruction: protected mode, then the
/// code at [`BOOT`].
fn firmware() -> Vec<u8> {
    let mut rom = vec![0xf4u8; 0x1_0000];
    let mut put = |at: usize, bytes: &[u8]| rom[at..at + bytes.len()].copy_from_slice(bytes);
    // JMP ff00
    put(0xfff0, &[0xe9, 0x0d, 0xff]);
    let mut code = vec![0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0x80, 0xff];
    // MOV EAX, CR0; OR AL, 1; MOV CR0, EAX; JMP 18:1f
    code.extend([0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0x66, 0xea]);
    code.extend(0xffff_ff40u32.to_le_bytes());
    code.extend([0x18, 0]);
    put(0xff00, &code);
    // MOV EAX, 10; MOV DS, ES, SS, EAX; JMP EAX = BOOT
    let mut code = vec![0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xb8];
    code.extend((BOOT as u32).to_le_bytes());
    code.extend([0xff, 0xe0]);
    put(0xff40, &code);
    let mut operand = vec![39, 0];
    operand.extend((BOOT_GDT as u32).to_le_bytes());
    put(0xff80, &operand);
    rom
}

fn os(what: &str, error: std::io::Error) -> String {
    format!("{what}: {error}")
}

impl Qemu {
    /// The program's name.
    pub const PROGRAM: &'static str = "qemu-system-x86_64";

    /// Is QEMU installed?
    pub fn exists() -> bool {
        let mut command = Command::new(Self::PROGRAM);
        command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }

    /// Start one.
    ///
    /// # Errors
    /// QEMU is missing or does not start, or there is no room for its memory.
    pub fn new() -> Result<Self, String> {
        let shared = PathBuf::from("/dev/shm");
        let folder = if shared.is_dir() { shared } else { std::env::temp_dir() };
        let unique = Instant::now();
        let folder = folder.join(format!("bunshin-oracle-{}-{:p}", std::process::id(), &unique));
        std::fs::create_dir(&folder).map_err(|e| os("no folder for QEMU's memory", e))?;
        match Self::start(&folder) {
            Ok((child, ram)) => Ok(Self { child, ram, folder }),
            Err(error) => {
                let _ = std::fs::remove_dir_all(&folder);
                Err(error)
            }
        }
    }

    fn start(folder: &std::path::Path) -> Result<(Child, *mut u8), String> {
        let (rom, memory) = (folder.join("firmware"), folder.join("memory"));
        std::fs::write(&rom, firmware()).map_err(|e| os("firmware", e))?;
        let file = File::create_new(&memory).map_err(|e| os("memory", e))?;
        file.set_len(RAM).map_err(|e| os("memory", e))?;
        let file = File::options().read(true).write(true).open(&memory).map_err(|e| os("memory", e))?;
        // SAFETY: a fresh shared mapping of our own file.
        let ram = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), RAM as usize, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if ram == libc::MAP_FAILED {
            return Err(os("memory", std::io::Error::last_os_error()));
        }
        let ram = ram.cast::<u8>();
        for (gpa, bytes) in harness::image() {
            // SAFETY: the image lies inside RAM.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), ram.add(*gpa as usize), bytes.len()) };
        }
        let backend = format!("memory-backend-file,id=m,size={RAM},share=on,mem-path={}", memory.display());
        let child = Command::new(Self::PROGRAM)
            .args(["-machine", "microvm,memory-backend=m,pic=off,pit=off,rtc=off,isa-serial=off"])
            .args(["-accel", "tcg,tb-size=64", "-cpu", CPU, "-m", &format!("{}M", RAM >> 20)])
            .args(["-object", &backend, "-bios"])
            .arg(&rom)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-monitor", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|e| os(Self::PROGRAM, e));
        if child.is_err() {
            // SAFETY: mapped above.
            unsafe { libc::munmap(ram.cast(), RAM as usize) };
        }
        Ok((child?, ram))
    }

    fn command(&mut self, text: &str) -> Result<(), String> {
        let input = self.child.stdin.as_mut().ok_or("QEMU's monitor is gone")?;
        writeln!(input, "{text}").map_err(|e| os("QEMU's monitor", e))
    }
}

impl Machine for Qemu {
    fn name(&self) -> &'static str {
        "QEMU"
    }

    fn write(&mut self, gpa: u64, bytes: &[u8]) {
        assert!(gpa + bytes.len() as u64 <= RAM);
        // SAFETY: inside the mapping; the other process may race, bytes are bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ram.add(gpa as usize), bytes.len()) };
    }

    fn read(&mut self, gpa: u64, bytes: &mut [u8]) {
        assert!(gpa + bytes.len() as u64 <= RAM);
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(self.ram.add(gpa as usize), bytes.as_mut_ptr(), bytes.len()) };
    }

    fn run(&mut self, go: u64) -> Result<bool, String> {
        let clock = processor_time::of_process(self.child.id()).ok_or("QEMU has no clock")?;
        let (mut seen, mut since) = (word(self, INDEX), processor_time::spent(clock));
        loop {
            std::thread::sleep(Duration::from_micros(200));
            if word(self, DONE) == go {
                return Ok(true);
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(format!("QEMU ended: {status}"));
            }
            let (index, now) = (word(self, INDEX), processor_time::spent(clock));
            if index != seen {
                (seen, since) = (index, now);
            } else if now.saturating_sub(since) > PATIENCE {
                self.command("system_reset")?;
                return Ok(false);
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // SAFETY: mapped in `start`, QEMU is gone.
        unsafe { libc::munmap(self.ram.cast(), RAM as usize) };
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
