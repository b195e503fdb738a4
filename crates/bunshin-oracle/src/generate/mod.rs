//! Random cases. (seed, index) names one case for ever, on the same host and
//! with the same filter.
//!
//! A case is some instructions in a row, with branches, calls and loops made
//! by hand among them ([`branches`]), at an address that sometimes crosses a
//! page.
pub mod branches;
pub mod operands;
pub mod pool;
pub mod registers;
mod rewrite;
mod system;
mod walks;
mod writers;

use crate::arena::{CODE, CODE_LENGTH, PAGE};
use crate::case::Case;
use crate::random::Random;
use iced_x86::{Decoder, DecoderOptions, Encoder, Instruction, Mnemonic};
use operands::Operands;
use pool::Pool;
use registers::Roles;

/// Room that a case's code may need, in bytes.
const ROOM: u64 = 1024;
const MOST_INSTRUCTIONS: u64 = 12;

/// What to generate.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// Patterns of mnemonics with `*`, separated by commas; empty: all, with
    /// branches.
    pub only: String,
    /// Also FNSTENV, FXSAVE, XSAVE and their like, whose pointers and
    /// reserved bytes engines may rightly differ in.
    pub environment: bool,
    /// 32-bit code in compatibility mode.
    pub narrow: bool,
    /// Also CLI, IN, MOV CR0 and their like, which must fault in user mode.
    pub privileged: bool,
    /// Code that changes itself: half of every case are the shapes of
    /// `rewrite`.
    pub rewriting: bool,
}

/// Makes cases.
pub struct Generator {
    pool: Pool,
    branches: bool,
    narrow: bool,
    rewriting: bool,
    encoder: Encoder,
}

/// Does `text` match a pattern with `*`?
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, rest)) => {
            let Some(text) = text.strip_prefix(head) else { return false };
            (0..=text.len()).any(|at| text.is_char_boundary(at) && matches(rest, &text[at..]))
        }
    }
}

impl Generator {
    /// # Errors
    /// No mnemonic matches.
    pub fn new(choice: &Choice) -> Result<Self, String> {
        let patterns: Vec<_> =
            choice.only.split(',').map(str::trim).filter(|p| !p.is_empty()).map(str::to_lowercase).collect();
        let pool = Pool::new(choice, &|mnemonic| {
            patterns.is_empty() || patterns.iter().any(|p| matches(p, mnemonic))
        });
        if pool.is_empty() {
            return Err(format!("no instruction of this host matches {:?}", choice.only));
        }
        let bits = if choice.narrow { 32 } else { 64 };
        Ok(Self {
            pool,
            branches: patterns.is_empty(),
            narrow: choice.narrow,
            rewriting: choice.rewriting,
            encoder: Encoder::new(bits),
        })
    }

    /// The encodings that are drawn from.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Make one case.
    pub fn case(&mut self, seed: u64, index: u64) -> Case {
        let mut random = Random::for_case(seed, index);
        let (mut state, mut roles) = registers::draw(&mut random);
        let narrow = self.narrow;
        if narrow {
            roles.pointers.retain(|r| *r < 8);
            roles.indexes.retain(|r| *r < 8);
            roles.vector_indexes.retain(|r| *r < 8);
            if roles.indexes.is_empty() {
                roles.indexes.push(0);
            }
            if roles.vector_indexes.is_empty() {
                roles.vector_indexes.push(0);
            }
            for gpr in &mut state.gpr[..8] {
                *gpr &= 0xffff_ffff;
            }
            // The translator's VZEROUPPER does not spare them.
            for i in 8..crate::state::Xsave::shape().0 {
                state.xsave.set_vector(i, [0; 64]);
            }
        }
        state.rip = start(&mut random);
        let patches = registers::patches(&mut random, &state, &roles);
        let mut block = Block {
            generator: self,
            random: &mut random,
            roles: &roles,
            reserved: Vec::new(),
            start: state.rip,
            rip: state.rip,
            code: Vec::new(),
            patches,
        };
        let count = 1 + block.random.below(MOST_INSTRUCTIONS);
        if block.generator.rewriting {
            block.fill_rewriting(count);
        } else {
            block.fill(count);
        }
        let (code, patches) = (block.code, block.patches);
        Case { seed, index, code, state, narrow, patches }
    }
}

/// Where a case's code starts.
fn start(random: &mut Random) -> u64 {
    let at = match random.below(10) {
        0 => PAGE * (1 + random.below(2)) - random.below(64),
        1 => random.below(256) * 16,
        _ => random.below(CODE_LENGTH - ROOM),
    };
    CODE + at
}

/// Code under construction.
pub struct Block<'a> {
    generator: &'a mut Generator,
    random: &'a mut Random,
    roles: &'a Roles,
    reserved: Vec<usize>,
    start: u64,
    rip: u64,
    code: Vec<Vec<u8>>,
    patches: Vec<(u64, Vec<u8>)>,
}

impl Block<'_> {
    /// Add about `count` instructions.
    fn fill(&mut self, count: u64) {
        let end = self.code.len() + count as usize;
        while self.code.len() < end {
            if self.generator.branches && self.random.one_in(9) {
                self.branch();
            } else if self.generator.branches && self.reserved.is_empty() && self.random.one_in(40) {
                if self.system() {
                    return;
                }
            } else {
                self.plain();
            }
        }
    }

    /// The same, but with shapes that rewrite code.
    fn fill_rewriting(&mut self, count: u64) {
        for _ in 0..1 + count / 4 {
            if self.rip - self.start > ROOM / 2 {
                break;
            }
            self.rewrite();
            if self.random.one_in(2) {
                self.fill(1);
            }
        }
    }

    fn bits(&self) -> u32 {
        if self.generator.narrow {
            32
        } else {
            64
        }
    }

    fn push(&mut self, bytes: Vec<u8>) {
        self.rip += bytes.len() as u64;
        self.code.push(bytes);
    }

    /// Encode and add; false when the encoder refuses.
    fn encode(&mut self, instruction: &Instruction) -> bool {
        match self.generator.encoder.encode(instruction, self.rip) {
            Ok(_) => {
                let bytes = self.generator.encoder.take_buffer();
                self.push(bytes);
                true
            }
            Err(_) => {
                drop(self.generator.encoder.take_buffer());
                false
            }
        }
    }

    /// Add one instruction from the pool.
    fn plain(&mut self) {
        let bytes = self.instruction_at(self.rip);
        self.push(bytes);
    }

    /// One instruction from the pool, encoded for an address.
    fn instruction_at(&mut self, rip: u64) -> Vec<u8> {
        for _ in 0..50 {
            let code = self.generator.pool.draw(self.random);
            for _ in 0..6 {
                let instruction = Operands {
                    random: self.random,
                    roles: self.roles,
                    reserved: &self.reserved,
                    rip,
                    narrow: self.generator.narrow,
                }
                .fill(code);
                if !self.reserved.is_empty() && self.touches_reserved(&instruction) {
                    break;
                }
                let Ok(_) = self.generator.encoder.encode(&instruction, rip) else {
                    drop(self.generator.encoder.take_buffer());
                    continue;
                };
                let mut bytes = self.generator.encoder.take_buffer();
                // A gather whose registers coincide, say: the manuals differ.
                if Decoder::new(self.bits(), &bytes, DecoderOptions::NONE).decode().is_invalid() {
                    continue;
                }
                if self.random.one_in(25) {
                    bytes = self.with_noise(bytes);
                }
                return bytes;
            }
        }
        vec![0x90]
    }

    /// Add prefixes that change little or nothing: compilers and hand-written
    /// code do. Whatever results must still be an instruction that is allowed.
    fn with_noise(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        let mut noisy = bytes.clone();
        if self.generator.narrow {
            return bytes;
        }
        for _ in 0..=self.random.below(2) {
            let prefix = self
                .random
                .pick(&[0x66, 0x67, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65, 0xf2, 0xf3, 0x40, 0x41, 0x48, 0x4f]);
            noisy.insert(0, prefix);
        }
        let instruction = Decoder::with_ip(self.bits(), &noisy, self.rip, DecoderOptions::NONE).decode();
        // A REX prefix makes PAUSE an exchange with r8.
        let pause = instruction.mnemonic() == Mnemonic::Pause;
        let fits = instruction.len() == noisy.len() && noisy.len() <= 15 && !pause;
        let allowed = fits && self.generator.pool.allows(instruction.code());
        if allowed && (self.reserved.is_empty() || !self.touches_reserved(&instruction)) {
            noisy
        } else {
            bytes
        }
    }

    /// Does the instruction write a reserved register, or jump?
    fn touches_reserved(&self, instruction: &Instruction) -> bool {
        let mut factory = iced_x86::InstructionInfoFactory::new();
        factory.info(instruction).used_registers().iter().any(|used| {
            use iced_x86::OpAccess as A;
            let number = used.register().full_register() as usize;
            let first = iced_x86::Register::RAX as usize;
            let writes = !matches!(used.access(), A::None | A::Read | A::CondRead | A::NoMemAccess);
            writes && number >= first && self.reserved.contains(&(number - first))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_name_gives_the_same_case() {
        let mut one = Generator::new(&Choice::default()).unwrap();
        let mut two = Generator::new(&Choice::default()).unwrap();
        for index in [0, 7, 1_000_000] {
            assert_eq!(one.case(5, index).to_text(""), two.case(5, index).to_text(""));
        }
        assert_ne!(one.case(5, 0).to_text(""), one.case(6, 0).to_text(""));
    }

    #[test]
    fn code_stays_inside_and_decodes() {
        let mut generator = Generator::new(&Choice::default()).unwrap();
        for index in 0..3000 {
            let case = generator.case(1, index);
            let end = case.state.rip + case.bytes().len() as u64;
            assert!(end <= CODE + CODE_LENGTH, "case {index} ends at {end:#x}");
            for bytes in &case.code {
                let decoded = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
                assert!(!decoded.is_invalid(), "case {index}: {bytes:02x?}");
                assert_eq!(decoded.len(), bytes.len(), "case {index}: {bytes:02x?}");
            }
        }
    }

    #[test]
    fn rewriting_stays_inside_too() {
        for narrow in [false, true] {
            let choice = Choice { rewriting: true, narrow, ..Choice::default() };
            let mut generator = Generator::new(&choice).unwrap();
            for index in 0..3000 {
                let case = generator.case(1, index);
                let end = case.state.rip + case.bytes().len() as u64;
                assert!(end <= case.state.rip + ROOM && end <= CODE + CODE_LENGTH, "case {index}: {case:?}");
            }
        }
    }

    #[test]
    fn patterns() {
        assert!(matches("add*", "addps") && matches("*s", "addps") && matches("add", "add"));
        assert!(!matches("add", "addps") && !matches("a*d", "addps"));
        let choice = Choice { only: "adc, v*ovdqa".into(), ..Choice::default() };
        let generator = Generator::new(&choice).unwrap();
        let names: Vec<_> = generator.pool().codes().map(|c| format!("{:?}", c.mnemonic())).collect();
        assert!(names.iter().all(|n| n == "Adc" || n == "Vmovdqa"), "{names:?}");
        assert!(Generator::new(&Choice { only: "vmlaunch".into(), ..Choice::default() }).is_err());
    }
}
