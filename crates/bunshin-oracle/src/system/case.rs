//! A case for the system judges: slots of code and the words of its initial
//! state, laid out as the harness reads them.
//!
//! The text form is one word a line, only what differs from
//! [`SystemCase::default`]:
//!
//! ```text
//! # what went wrong
//! slot 0f 01 d0                   ; xgetbv
//! rax 10002000
//! gdt12 00affb000000ffff
//! ```
use super::layout::*;
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, NasmFormatter};
use std::fmt::Write;

/// Names and lengths of the word arrays, in the order of the layout.
const FIELDS: [(&str, usize); 37] = [
    ("gpr", 16),
    ("rip", 1),
    ("cs", 1),
    ("rflags", 1),
    ("rsp", 1),
    ("ss", 1),
    ("ds", 1),
    ("es", 1),
    ("fs", 1),
    ("gs", 1),
    ("fs_base", 1),
    ("gs_base", 1),
    ("kernel_gs_base", 1),
    ("cr0", 1),
    ("cr3", 1),
    ("cr4", 1),
    ("cr8", 1),
    ("efer", 1),
    ("xcr0", 1),
    ("star", 1),
    ("lstar", 1),
    ("cstar", 1),
    ("sfmask", 1),
    ("sysenter_cs", 1),
    ("sysenter_esp", 1),
    ("sysenter_eip", 1),
    ("idt", 1),
    ("breakpoint", 4),
    ("dr7", 1),
    ("gdt", 32),
    ("ldt", 8),
    ("tss", 24),
    ("pml4", 2),
    ("pdpt", 2),
    ("pd", 2),
    ("large", 2),
    ("pt", 2 * ENTRIES),
];

/// Words of state.
pub const WORDS: usize = words_before(FIELDS.len()) + 1;
/// Bytes of a case in guest memory: state, then code.
pub const CASE_BYTES: u64 = WORDS as u64 * 8 + (SLOTS as u64 + 1) * SLOT;

const fn words_before(field: usize) -> usize {
    let (mut i, mut sum) = (0, 0);
    while i < field {
        sum += FIELDS[i].1;
        i += 1;
    }
    sum
}

/// Index of the first word of a field.
///
/// # Panics
/// There is no such field.
pub fn at(name: &str) -> usize {
    let field = FIELDS.iter().position(|(n, _)| *n == name).unwrap_or_else(|| panic!("no field {name}"));
    words_before(field)
}

/// Offset of a field's first word in a case, in bytes.
pub fn offset(name: &str) -> u64 {
    8 * at(name) as u64
}

/// Code and state.
#[derive(Clone, PartialEq, Eq)]
pub struct SystemCase {
    /// Seed that the generator drew from.
    pub seed: u64,
    /// Number of the case under that seed.
    pub index: u64,
    /// At most [`SLOTS`], of at most [`SLOT`] bytes.
    pub slots: Vec<Vec<u8>>,
    /// Operand size that each slot was meant for.
    pub bits: Vec<u32>,
    /// Slots whose instruction is privileged, changes the mode or depends on it.
    pub privileged: u32,
    /// State, see [`at`].
    pub words: [u64; WORDS],
}

/// A flat descriptor: base 0, limit 4 GiB.
pub const fn flat(access: u64) -> u64 {
    0xffff | (access & 0xff) << 40 | 0xf << 48 | (access >> 12) << 52
}

/// The first half of a 16-byte descriptor: TSS or LDT.
pub const fn system(base: u64, limit: u64, kind: u64) -> u64 {
    (base & 0xff_ffff) << 16 | limit & 0xffff | (0x80 | kind) << 40 | (base >> 24 & 0xff) << 56
}

impl Default for SystemCase {
    fn default() -> Self {
        let mut case =
            Self { seed: 0, index: 0, slots: Vec::new(), bits: Vec::new(), privileged: 0, words: [0; WORDS] };
        for (name, value) in [
            ("rip", CODE_SUPERVISOR),
            ("cs", KERNEL_CS),
            ("rflags", 2),
            ("rsp", STACK0 + 0x800),
            ("ss", KERNEL_SS),
            ("ds", USER_SS),
            ("es", USER_SS),
            ("cr0", CR0),
            ("cr3", TABLES[0]),
            ("cr4", CR4),
            ("efer", EFER),
            ("xcr0", 7),
            ("star", (USER_CS32) << 48 | KERNEL_CS << 32),
            ("lstar", CODE_SUPERVISOR),
            ("cstar", CODE_SUPERVISOR),
            ("sfmask", 0x4_0fd5),
        ] {
            case.words[at(name)] = value;
        }
        let gdt = at("gdt");
        for (selector, descriptor) in [
            (KERNEL_CS, flat(0xa09b)),
            (KERNEL_SS, flat(0xc093)),
            (USER_CS32, flat(0xc0fb)),
            (USER_SS, flat(0xc0f3)),
            (USER_CS, flat(0xa0fb)),
            (TR, system(HALF + TSS, 0xbf, 9)),
            (TR + 8, HALF >> 32),
            (LDTR, system(HALF + LDT, 63, 2)),
            (LDTR + 8, HALF >> 32),
            (TR_OTHER, system(HALF + TSS_OTHER, 0x67, 9)),
            (TR_OTHER + 8, HALF >> 32),
        ] {
            case.words[gdt + selector as usize / 8] = descriptor;
        }
        let tss = at("tss");
        let mut bytes = [0u8; 192];
        bytes[4..12].copy_from_slice(&(STACK0 + 0xc00).to_le_bytes());
        bytes[36..44].copy_from_slice(&(HALF + IST1).to_le_bytes());
        bytes[44..52].copy_from_slice(&(HALF + IST2).to_le_bytes());
        bytes[102..104].copy_from_slice(&104u16.to_le_bytes());
        bytes[104..].fill(0xff);
        for (word, bytes) in case.words[tss..tss + 24].iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap());
        }
        const USER: u64 = 0x67;
        const SUPERVISOR: u64 = 0x63;
        for (n, tables) in TABLES.iter().enumerate() {
            case.words[at("pml4") + n] = (tables + 0x1000) | USER;
            case.words[at("pdpt") + n] = (tables + 0x2000) | USER;
            case.words[at("pd") + n] = (tables + 0x3000) | USER;
            case.words[at("large") + n] = LARGE | USER | 0x80;
            let pt = &mut case.words[at("pt") + n * ENTRIES..][..ENTRIES];
            pt[0] = CODE | USER;
            pt[1] = CODE | SUPERVISOR;
            for (i, entry) in pt[2..6].iter_mut().enumerate() {
                *entry = (PAGES + 0x1000 * i as u64) | USER;
            }
            pt[6] = (PAGES + 0x4000) | SUPERVISOR;
            pt[7] = (PAGES + 0x5000) | USER;
            pt[8] = (tables + 0x3000) | SUPERVISOR;
        }
        case
    }
}

impl std::fmt::Debug for SystemCase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.to_text(""))
    }
}

impl SystemCase {
    /// A word by its field's name.
    pub fn get(&self, name: &str) -> u64 {
        self.words[at(name)]
    }

    /// Set a word by its field's name.
    pub fn set(&mut self, name: &str, value: u64) {
        self.words[at(name)] = value;
    }

    /// The case as it lies in guest memory.
    pub fn bytes(&self) -> Vec<u8> {
        let mut words = self.words;
        words[WORDS - 1] = self.slots.len() as u64 * SLOT;
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        for slot in &self.slots {
            let end = bytes.len() + SLOT as usize;
            bytes.extend(&slot[..slot.len().min(SLOT as usize)]);
            bytes.resize(end, 0x90);
        }
        // INT3 ends it.
        bytes.resize(CASE_BYTES as usize, 0xcc);
        bytes
    }

    /// One line a slot.
    pub fn listing(&self) -> Vec<String> {
        let mut formatter = NasmFormatter::new();
        let mut lines = Vec::new();
        for (n, (slot, bits)) in self.slots.iter().zip(&self.bits).enumerate() {
            let mut text = String::new();
            let at = CODE_SUPERVISOR + n as u64 * SLOT;
            let mut decoder = Decoder::with_ip(*bits, slot, at, DecoderOptions::AMD);
            let mut instruction = Instruction::default();
            while decoder.can_decode() {
                decoder.decode_out(&mut instruction);
                if !text.is_empty() {
                    text += "; ";
                }
                formatter.format(&instruction, &mut text);
            }
            lines.push(text);
        }
        lines
    }

    /// The text form; `remark` goes on top.
    pub fn to_text(&self, remark: &str) -> String {
        let mut text = String::new();
        for line in remark.lines() {
            let _ = writeln!(text, "# {line}");
        }
        for ((slot, bits), listing) in self.slots.iter().zip(&self.bits).zip(self.listing()) {
            let hex: Vec<_> = slot.iter().map(|b| format!("{b:02x}")).collect();
            let _ = writeln!(text, "slot{bits} {:<60}; {listing}", hex.join(" "));
        }
        let initial = Self::default();
        for (i, (name, length)) in FIELDS.iter().enumerate() {
            for n in 0..*length {
                let word = words_before(i) + n;
                if self.words[word] != initial.words[word] {
                    let number = if *length == 1 { String::new() } else { n.to_string() };
                    let _ = writeln!(text, "{name}{number} {:x}", self.words[word]);
                }
            }
        }
        text
    }

    /// Read the text form.
    ///
    /// # Errors
    /// One sentence with the line's number.
    pub fn from_text(text: &str) -> Result<Self, String> {
        let mut case = Self::default();
        for (number, line) in text.lines().enumerate() {
            let bad = |what: &str| format!("line {}: {what}: {line:?}", number + 1);
            let body = line.split([';', '#']).next().unwrap_or("");
            let mut words = body.split_whitespace();
            let Some(first) = words.next() else { continue };
            if let Some(bits) = first.strip_prefix("slot") {
                let bytes: Option<Vec<u8>> =
                    words.map(|w| u8::from_str_radix(w, 16).ok().filter(|_| w.len() == 2)).collect();
                let bytes =
                    bytes.filter(|b| b.len() <= SLOT as usize).ok_or_else(|| bad("expected bytes"))?;
                let bits = bits.parse().ok().filter(|b| [16, 32, 64].contains(b));
                if case.slots.len() == SLOTS {
                    return Err(bad("too many slots"));
                }
                case.slots.push(bytes);
                case.bits.push(bits.ok_or_else(|| bad("expected slot16, slot32 or slot64"))?);
                continue;
            }
            let value = words.next().and_then(|w| u64::from_str_radix(w, 16).ok());
            let value = value.ok_or_else(|| bad("expected a number"))?;
            let word = FIELDS.iter().enumerate().find_map(|(i, (name, length))| {
                let rest = first.strip_prefix(name)?;
                let n: usize =
                    if *length == 1 { rest.is_empty().then_some(0)? } else { rest.parse().ok()? };
                (n < *length).then_some(words_before(i) + n)
            });
            case.words[word.ok_or_else(|| bad("unknown word"))?] = value;
        }
        Ok(case)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_comes_back_as_the_same_case() {
        let mut case = SystemCase::default();
        case.slots.push(vec![0x0f, 0x01, 0xd0]);
        case.bits.push(64);
        case.words[at("gpr") + 3] = 7;
        case.words[at("pt") + 31] = 9;
        case.set("kernel_gs_base", 5);
        let text = case.to_text("a remark");
        let back = SystemCase::from_text(&text).unwrap();
        assert!(back == case, "{text}");
        assert!(text.contains("; xgetbv"), "{text}");
    }

    #[test]
    fn nonsense_is_refused_with_its_line() {
        assert!(SystemCase::from_text("\nslot64 zz").unwrap_err().starts_with("line 2"));
        assert!(SystemCase::from_text("gdt32 1").unwrap_err().starts_with("line 1"));
        assert!(SystemCase::from_text("star").is_err());
    }

    #[test]
    fn a_batch_fits() {
        const { assert!(CASES + BATCH as u64 * CASE_BYTES <= LOG) };
        const { assert!(LOG + BATCH as u64 * (MOST + 2) * RECORD as u64 * 8 <= LARGE) };
    }
}
