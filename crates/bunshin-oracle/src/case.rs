//! One case: a few instructions, the registers and memory they start from,
//! and the text form in which cases are kept under `cases/`.
//!
//! ```text
//! # what went wrong, when, which case found it
//! code 10000000
//!   48 11 d8              ; adc rax,rbx
//!   73 02                 ; jae short 10000007h
//! rax 1
//! rflags 247
//! v3 000102...            ; most significant byte first, 16, 32 or 64 bytes
//! st0 3fff8000000000000000
//! memory 20000040 01 02 03
//! ```
//! `bits 32` before `code` makes it 32-bit code. Numbers are hexadecimal. A register that is not named has its initial
//! value: zero, or the FPU's state after FNINIT, MXCSR 1f80, rflags 202. INT3
//! follows the last instruction. `;` starts a remark.
use crate::arena;
use crate::state::{UserState, Xsave, GPR_NAMES};
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, NasmFormatter};
use std::fmt::Write;

/// Code, registers and memory to start from.
#[derive(Clone)]
pub struct Case {
    /// Seed that the generator drew from.
    pub seed: u64,
    /// Number of the case under that seed; [`u64::MAX`] for one made by hand.
    pub index: u64,
    /// Encoded instructions, in order, starting at `state.rip`.
    pub code: Vec<Vec<u8>>,
    /// Registers at the first instruction.
    pub state: UserState,
    /// 32-bit code, in compatibility mode.
    pub narrow: bool,
    /// Bytes laid over the base image, before the code.
    pub patches: Vec<(u64, Vec<u8>)>,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.to_text(""))
    }
}

impl Case {
    /// A case made by hand: code at `rip` with every register initial, the
    /// stack pointer in the middle of the stack.
    pub fn new(rip: u64, code: Vec<Vec<u8>>) -> Self {
        let mut state = UserState { rip, ..UserState::default() };
        state.gpr[4] = arena::STACK + arena::STACK_LENGTH / 2;
        Self { seed: 0, index: u64::MAX, code, state, narrow: false, patches: Vec::new() }
    }

    /// Operand size of the code, for decoders.
    pub fn bits(&self) -> u32 {
        if self.narrow {
            32
        } else {
            64
        }
    }

    /// All of the code, INT3 included.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.code.concat();
        bytes.push(0xcc);
        bytes
    }

    /// Every write that prepares memory: the patches, then the code.
    pub fn writes(&self) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        self.patches.iter().cloned().chain(std::iter::once((self.state.rip, self.bytes())))
    }

    /// The instructions as iced decodes them, one a row.
    pub fn listing(&self) -> Vec<String> {
        let mut formatter = NasmFormatter::new();
        let mut rip = self.state.rip;
        self.code
            .iter()
            .map(|bytes| {
                let mut text = String::new();
                let mut decoder = Decoder::with_ip(self.bits(), bytes, rip, DecoderOptions::NONE);
                let mut instruction = Instruction::default();
                while decoder.can_decode() {
                    decoder.decode_out(&mut instruction);
                    if !text.is_empty() {
                        text += "; ";
                    }
                    formatter.format(&instruction, &mut text);
                }
                rip += bytes.len() as u64;
                text
            })
            .collect()
    }

    /// The text form; `remark` goes on top.
    pub fn to_text(&self, remark: &str) -> String {
        let mut text = String::new();
        for line in remark.lines() {
            let _ = writeln!(text, "# {line}");
        }
        if self.narrow {
            let _ = writeln!(text, "bits 32");
        }
        let _ = writeln!(text, "code {:x}", self.state.rip);
        for (bytes, listing) in self.code.iter().zip(self.listing()) {
            let _ = writeln!(text, "  {:<30}; {listing}", hex(bytes));
        }
        for (name, value) in GPR_NAMES.iter().zip(self.state.gpr) {
            if value != 0 {
                let _ = writeln!(text, "{name} {value:x}");
            }
        }
        let mut register = |name: &str, value: u64, initial: u64| {
            if value != initial {
                let _ = writeln!(text, "{name} {value:x}");
            }
        };
        let (area, initial) = (&self.state.xsave, Xsave::default());
        register("rflags", self.state.rflags, 0x202);
        register("mxcsr", area.mxcsr().into(), initial.mxcsr().into());
        register("fcw", area.fcw().into(), initial.fcw().into());
        register("fsw", area.fsw().into(), initial.fsw().into());
        register("ftw", area.ftw().into(), initial.ftw().into());
        for i in 0..8 {
            register(&format!("k{i}"), area.opmask(i), 0);
        }
        for i in 0..8 {
            if area.st(i) != [0; 10] {
                let _ = writeln!(text, "st{i} {}", hex_number(&area.st(i)));
            }
        }
        for i in 0..Xsave::shape().0 {
            let value = area.vector(i);
            if let Some(top) = value.iter().rposition(|b| *b != 0) {
                let width = [16, 32, 64].into_iter().find(|w| top < *w).unwrap_or(64);
                let _ = writeln!(text, "v{i} {}", hex_number(&value[..width]));
            }
        }
        for (address, bytes) in &self.patches {
            let _ = writeln!(text, "memory {address:x} {}", hex(bytes));
        }
        text
    }

    /// Read the text form.
    ///
    /// # Errors
    /// One sentence with the line's number.
    pub fn from_text(text: &str) -> Result<Self, String> {
        let mut case = Self::new(arena::CODE, Vec::new());
        case.state.gpr[4] = 0;
        let mut started = false;
        for (number, line) in text.lines().enumerate() {
            let bad = |what: &str| format!("line {}: {what}: {line:?}", number + 1);
            let body = line.split([';', '#']).next().unwrap_or("");
            let words: Vec<_> = body.split_whitespace().collect();
            let Some(first) = words.first() else { continue };
            if line.starts_with([' ', '\t']) {
                if !started {
                    return Err(bad("bytes before `code`"));
                }
                case.code.push(bytes_of(&words).ok_or_else(|| bad("expected bytes"))?);
                continue;
            }
            let value = *words.get(1).ok_or_else(|| bad("expected a value"))?;
            let number = || u64::from_str_radix(value, 16).map_err(|_| bad("expected a number"));
            let area = &mut case.state.xsave;
            let index = |prefix: &str, below: usize| {
                first.strip_prefix(prefix)?.parse::<usize>().ok().filter(|i| *i < below)
            };
            if let Some(i) = GPR_NAMES.iter().position(|name| name == first) {
                case.state.gpr[i] = number()?;
            } else if let Some(i) = index("st", 8) {
                let bytes = number_of(value, 10).ok_or_else(|| bad("expected 10 bytes"))?;
                area.set_st(i, bytes.try_into().unwrap());
            } else if let Some(i) = index("v", 32) {
                let bytes = number_of(value, 64).ok_or_else(|| bad("expected 64 bytes at most"))?;
                area.set_vector(i, bytes.try_into().unwrap());
            } else if let Some(i) = index("k", 8) {
                area.set_opmask(i, number()?);
            } else {
                match *first {
                    "bits" => case.narrow = value == "32",
                    "code" => {
                        case.state.rip = number()?;
                        started = true;
                    }
                    "rflags" => case.state.rflags = number()?,
                    "mxcsr" => area.set_mxcsr(number()? as u32),
                    "fcw" => area.set_fcw(number()? as u16),
                    "fsw" => area.set_fsw(number()? as u16),
                    "ftw" => area.set_ftw(number()? as u8),
                    "memory" => {
                        let bytes = bytes_of(&words[2..]).ok_or_else(|| bad("expected bytes"))?;
                        case.patches.push((number()?, bytes));
                    }
                    _ => return Err(bad("unknown word")),
                }
            }
        }
        if !started {
            return Err("no `code` line".into());
        }
        Ok(case)
    }
}

fn hex(bytes: &[u8]) -> String {
    let words: Vec<_> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    words.join(" ")
}

fn hex_number(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

fn bytes_of(words: &[&str]) -> Option<Vec<u8>> {
    words.iter().map(|w| if w.len() == 2 { u8::from_str_radix(w, 16).ok() } else { None }).collect()
}

/// Little-endian bytes of a hexadecimal number, zero-extended to `length`.
fn number_of(text: &str, length: usize) -> Option<Vec<u8>> {
    if text.len() % 2 != 0 || text.len() > 2 * length || !text.is_ascii() {
        return None;
    }
    let mut bytes = (0..text.len())
        .step_by(2)
        .rev()
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok())
        .collect::<Option<Vec<_>>>()?;
    bytes.resize(length, 0);
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_comes_back_as_the_same_case() {
        let mut case = Case::new(0x1000_0ff8, vec![vec![0x48, 0x11, 0xd8], vec![0x90]]);
        case.state.gpr[0] = 1;
        case.state.rflags = 0x247;
        case.state.xsave.set_vector(3, [7; 64]);
        case.state.xsave.set_st(1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        case.state.xsave.set_opmask(2, 0xff00);
        case.state.xsave.set_mxcsr(0x9fc0);
        case.patches.push((0x2000_0040, vec![1, 2, 3]));
        let text = case.to_text("a remark");
        let back = Case::from_text(&text).unwrap();
        assert!(back.state == case.state, "{text}");
        assert_eq!(back.code, case.code);
        assert_eq!(back.patches, case.patches);
        assert!(text.contains("; adc rax,rbx"), "{text}");
    }

    #[test]
    fn nonsense_is_refused_with_its_line() {
        assert!(Case::from_text("code 10000000\n  zz\n").unwrap_err().starts_with("line 2"));
        assert!(Case::from_text("code 10000000\nrax\n").unwrap_err().starts_with("line 2"));
        assert!(Case::from_text("rax 1\n").is_err());
    }
}
