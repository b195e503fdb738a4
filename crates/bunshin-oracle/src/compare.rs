//! Two judges run the same case; what they find must be equal.
//!
//! Always compared: how the run stopped, general registers, rip, the XSAVE
//! area in its normal form, and all memory. Not compared:
//!
//! - flags at a fault, unless [`Options::exact_flags`]: an engine may not have
//!   computed what no instruction would read; RF, IF and above never;
//! - anything when the left side ran out of time, or the right one did in a
//!   case of more than [`MOST_INSTRUCTIONS`];
//! - flags that are dead in code which the case overwrites afterwards, see
//!   [`Comparison::all_flags`];
//! - the page-fault error code at non-user addresses, where Linux hides it;
//! - what [`exempt`] finds: results that the processor does not promise.
use crate::arena::{base_image, image_address, image_offset, CODE, CODE_LENGTH, LINE};
use crate::case::Case;
use crate::state::{register_text, Difference, UserState, USER_FLAGS};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic, OpKind, Register};

/// Why a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// INT3; rip is behind it.
    Breakpoint,
    /// An exception.
    Fault {
        /// Exception number.
        vector: u8,
        /// Error code, 0 for exceptions without one.
        error: u32,
        /// Linear address for vector 14, otherwise 0.
        address: u64,
    },
    /// A SYSCALL instruction, or INT 80h.
    Syscall,
    /// The run did not end; registers and memory mean nothing.
    Timeout,
    /// The judge itself could not go on.
    Failed(String),
}

/// What a judge found.
#[derive(Clone)]
pub struct Outcome {
    /// Registers after the run, normalised.
    pub state: UserState,
    /// es, ds, fs, gs after the run; at first [`SELECTORS`].
    pub selectors: [u16; 4],
    /// FS and GS base after the run; 0 at first.
    pub bases: [u64; 2],
    /// Why it ended.
    pub stop: Stop,
    /// Lines of memory that differ from the base image, by image offset.
    pub memory: Vec<(usize, [u8; LINE])>,
}

/// es, ds, fs, gs when a case starts.
pub const SELECTORS: [u16; 4] = [0x2b, 0x2b, 0, 0];

/// A selector as it is compared: the host's IRET to user mode clears the low
/// bits of null ones.
pub(crate) fn null(selector: u16) -> u16 {
    if selector < 4 {
        0
    } else {
        selector
    }
}

/// Something that can run a case: the host processor, an engine.
pub trait Judge {
    /// For reports.
    fn name(&self) -> &'static str;
    /// Run a case from its state; nothing of it remains for the next.
    fn run(&mut self, case: &Case) -> Outcome;
    /// The same with a multiple of the time, for a case that ran out of it.
    fn run_patiently(&mut self, case: &Case) -> Outcome {
        self.run(case)
    }
    /// What [`Judge::run`] runs, one instruction at a time; nothing where the
    /// judge cannot tell.
    fn steps(&mut self, _case: &Case) -> Vec<Step> {
        Vec::new()
    }
    /// Does [`Judge::run`] run more than so many instructions? False where the
    /// judge cannot tell.
    fn runs_longer_than(&mut self, _case: &Case, _instructions: usize) -> bool {
        false
    }
}

/// Instructions that a case may take. A processor does a thousand times as many
/// in its time, among them stores over its own code, which cost a translator
/// as much as a thousand others.
const MOST_INSTRUCTIONS: usize = 100_000;

/// How strict to be.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Compare the arithmetic flags at faults too.
    pub exact_flags: bool,
}

/// Differences that a report shows.
const SHOWN: usize = 24;

/// One instruction that ran.
pub struct Step {
    /// Where it lies.
    pub rip: u64,
    /// Its bytes and some that follow.
    pub bytes: [u8; 15],
    /// It wrote over its own bytes.
    pub overwrote_itself: bool,
}

/// Why a difference says nothing, given what ran on the host; None in nearly
/// all cases. Code that writes over itself or jumps into its own middle is
/// concerned, and what the translator documents as not modelled:
///
/// - it can become an instruction that the generator would not make: NOT of
///   F0 CE is RDTSC;
/// - or lose the instructions that were to overwrite what RDTSC gave;
/// - or one that the host lacks, or the decoder of this crate does not know;
/// - a repeated string operation that overwrites itself goes on with the old
///   bytes until an interrupt of the host makes it start again;
/// - INT1 in a virtual machine may leave rip where it was;
/// - a branch to a non-canonical address faults at its target, where processors fault
///   at the branch and leave the stack pointer alone (so does Zen 4);
/// - the last bytes of the address space are the host's page fault without a
///   segment base, and its #GP with one.
pub fn exempt(case: &Case, left: &Outcome, right: &Outcome, steps: &[Step]) -> Option<&'static str> {
    let rip = right.state.rip;
    let branch = || {
        let at = left.state.rip.wrapping_sub(CODE) as usize;
        let code = CodeImage::new(case, left).after;
        let bytes = code.get(at..).unwrap_or(&[]);
        use FlowControl as F;
        let flow = Decoder::new(case.bits(), bytes, DecoderOptions::AMD).decode().flow_control();
        matches!(flow, F::Return | F::IndirectBranch | F::IndirectCall)
    };
    let at_target = (rip as i64) << 16 >> 16 != rip as i64;
    let general = |side: &Outcome| matches!(side.stop, Stop::Fault { vector: 13, .. });
    if at_target && general(left) && general(right) && branch() {
        return Some("a branch to a non-canonical address faults at its target");
    }
    for (n, step) in steps.iter().enumerate() {
        let behind = &steps[n + 1..];
        let instruction = Decoder::new(case.bits(), &step.bytes, DecoderOptions::AMD).decode();
        if !crate::generate::pool::host_runs(instruction.code(), case.narrow) {
            return Some("the case made itself an instruction that the host lacks");
        }
        // A single step may end the case before the result is overwritten.
        let next = step.rip.wrapping_add(instruction.len() as u64);
        let stepped = matches!(left.stop, Stop::Fault { vector: 1, .. }) && left.state.rip == next;
        let stays = stepped || !meant(case, step) || !overwritten(case, instruction.mnemonic(), behind);
        if unpromised(instruction.mnemonic(), case.narrow) && stays {
            return Some("the case made itself an instruction that is not deterministic");
        }
        let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        if instruction.is_string_instruction() && repeated && step.overwrote_itself {
            return Some("a repeated string operation overwrote itself");
        }
        let last = behind.is_empty();
        let top = matches!(right.stop, Stop::Fault { vector: 14, address: 0xffff_ffff_ffff_ff80.., .. });
        if last && top && matches!(instruction.segment_prefix(), Register::FS | Register::GS) {
            return Some("across the top of the address space, with a segment base, the host has #GP");
        }
    }
    None
}

/// Is this one of the case's own instructions, as the generator made it?
fn meant(case: &Case, step: &Step) -> bool {
    let mut rip = case.state.rip;
    case.code.iter().any(|bytes| {
        let here = rip == step.rip && step.bytes.starts_with(bytes);
        rip += bytes.len() as u64;
        here
    })
}

/// Do the steps behind an instruction overwrite the registers that it gave, as the
/// generator meant them to?
fn overwritten(case: &Case, mnemonic: Mnemonic, behind: &[Step]) -> bool {
    use Mnemonic as M;
    let registers = match mnemonic {
        M::Rdrand | M::Rdseed | M::Rdpid => 1,
        M::Rdtsc | M::Xgetbv => 2,
        M::Rdtscp => 3,
        M::Cpuid => 4,
        _ => 0,
    };
    // A MOV of a constant each.
    let load = |step: &Step| {
        let i = Decoder::new(case.bits(), &step.bytes, DecoderOptions::AMD).decode();
        i.mnemonic() == M::Mov && i.op1_kind() == OpKind::Immediate32 && meant(case, step)
    };
    behind.len() >= registers && behind[..registers].iter().all(load)
}

/// Is the result nobody's promise, the hypervisor's or the kernel's?
pub(crate) fn unpromised(mnemonic: Mnemonic, narrow: bool) -> bool {
    use Mnemonic as M;
    match mnemonic {
        M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdpmc | M::Rdrand | M::Rdseed | M::Cpuid | M::Xgetbv => true,
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lsl | M::Lar | M::Verr | M::Verw => true,
        M::Rdpru | M::Monitorx | M::Mwaitx | M::Vmmcall | M::Vmcall | M::Clzero | M::Mcommit => true,
        // Some hypervisors leave rip on it.
        M::Int1 => true,
        // They store FIP and FDP.
        M::Fnstenv | M::Fnsave | M::Fxsave | M::Fxsave64 | M::Xsave | M::Xsave64 => true,
        M::Xsavec | M::Xsavec64 | M::Xsaveopt | M::Xsaveopt64 => true,
        // Nothing keeps these from Linux.
        M::Syscall | M::Sysenter => narrow,
        _ => false,
    }
}

/// The code segment before and after a run.
struct CodeImage {
    before: Vec<u8>,
    after: Vec<u8>,
}

impl CodeImage {
    fn new(case: &Case, outcome: &Outcome) -> Self {
        let length = CODE_LENGTH as usize;
        let mut after = base_image()[..length].to_vec();
        let mut before = after.clone();
        for (address, bytes) in case.writes() {
            if let Some(at) = image_offset(address, bytes.len()).filter(|at| *at < length) {
                before[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
        for (at, line) in outcome.memory.iter().filter(|(at, _)| *at < length) {
            after[*at..at + LINE].copy_from_slice(line);
        }
        Self { before, after }
    }
}

/// Did the run change code that was there before it?
fn rewrote(case: &Case, outcome: &Outcome) -> bool {
    let code = CodeImage::new(case, outcome);
    code.before != code.after
}

/// Does the case store what FIP, FDP and their like hold? Engines may give
/// zero for them.
fn stores_pointers(case: &Case, outcome: &Outcome) -> bool {
    use Mnemonic as M;
    let code = CodeImage::new(case, outcome);
    let from = (case.state.rip - CODE) as usize;
    let after = &code.after[from..from + case.bytes().len()];
    (0..after.len()).any(|at| {
        matches!(
            Decoder::new(case.bits(), &after[at..], DecoderOptions::NONE).decode().mnemonic(),
            M::Fnstenv
                | M::Fnsave
                | M::Fxsave
                | M::Fxsave64
                | M::Xsave
                | M::Xsave64
                | M::Xsavec
                | M::Xsavec64
                | M::Xsaveopt
                | M::Xsaveopt64
        )
    })
}

/// Everything in which two outcomes differ; empty when they agree.
pub fn differences(case: &Case, left: &Outcome, right: &Outcome, options: Options) -> Vec<Difference> {
    // The right side has more time than the left one.
    if left.stop == Stop::Timeout {
        return Vec::new();
    }
    let mut found = Vec::new();
    if comparable(&left.stop) != comparable(&right.stop) {
        found.push(Difference::new("stop", format!("{:x?}", left.stop), format!("{:x?}", right.stop)));
    }
    let fault = matches!(left.stop, Stop::Fault { .. }) || matches!(right.stop, Stop::Fault { .. });
    for (i, name) in ["fs base", "gs base"].into_iter().enumerate() {
        if left.bases[i] != right.bases[i] {
            let text = |v: u64| format!("{v:016x}");
            found.push(Difference::new(name, text(left.bases[i]), text(right.bases[i])));
        }
    }
    for (i, name) in ["es", "ds", "fs", "gs"].into_iter().enumerate() {
        if left.selectors[i] != right.selectors[i] {
            let text = |v: u16| format!("{v:04x}");
            found.push(Difference::new(name, text(left.selectors[i]), text(right.selectors[i])));
        }
    }
    let flags = if fault && !options.exact_flags { 0 } else { USER_FLAGS };
    found.extend(left.state.differences(&right.state, flags));
    if left.memory != right.memory {
        let pointers = stores_pointers(case, left);
        if pointers {
            // The case may have loaded them again, or jumped to them.
            found.clear();
        }
        memory_differences(left, right, pointers, &mut found);
    }
    found
}

fn comparable(stop: &Stop) -> Stop {
    match stop {
        Stop::Fault { vector: 14, error, address } if *address >= 0x7fff_ffff_f000 => {
            Stop::Fault { vector: 14, error: error | 1, address: *address }
        }
        other => other.clone(),
    }
}

/// With `pointers`, zero on the right is as good as anything.
fn memory_differences(left: &Outcome, right: &Outcome, pointers: bool, found: &mut Vec<Difference>) {
    let image = base_image();
    let mut offsets: Vec<_> = left.memory.iter().chain(&right.memory).map(|(at, _)| *at).collect();
    offsets.sort_unstable();
    offsets.dedup();
    let line = |outcome: &Outcome, at: usize| -> [u8; LINE] {
        match outcome.memory.iter().find(|(offset, _)| *offset == at) {
            Some((_, line)) => *line,
            None => image[at..at + LINE].try_into().unwrap(),
        }
    };
    for at in offsets {
        let (a, b) = (line(left, at), line(right, at));
        for part in (0..LINE).step_by(8) {
            let (a, b) = (&a[part..part + 8], &b[part..part + 8]);
            if a.iter().zip(b).any(|(a, b)| a != b && !(pointers && *b == 0)) {
                let name = format!("[{:x}]", image_address(at + part));
                found.push(Difference::new(name, register_text(a), register_text(b)));
            }
        }
    }
}

/// The first judge, the second, and how they are compared.
pub struct Comparison<'a> {
    /// The one that is right.
    pub left: &'a mut dyn Judge,
    /// The one that is judged.
    pub right: &'a mut dyn Judge,
    /// An engine like the right one that keeps every arithmetic flag. The
    /// translator drops flags that the code ahead overwrites. Should that code
    /// be overwritten itself before it runs, then they are gone: where a case
    /// rewrites code, only what differs here too is a difference.
    pub all_flags: Option<&'a mut dyn Judge>,
    /// How strict to be.
    pub options: Options,
}

impl Comparison<'_> {
    /// Run a case on both.
    pub fn run(&mut self, case: &Case) -> (Outcome, Vec<Difference>) {
        crate::native::note_current(case);
        let mut left = self.left.run(case);
        let mut right = self.right.run(case);
        if left.stop != Stop::Timeout && right.stop == Stop::Timeout {
            if self.left.runs_longer_than(case, MOST_INSTRUCTIONS) {
                left.stop = Stop::Timeout;
            } else {
                right = self.right.run_patiently(case);
            }
        }
        let mut found = differences(case, &left, &right, self.options);
        if let Some(judge) = self.all_flags.as_mut().filter(|_| !found.is_empty() && rewrote(case, &left)) {
            if differences(case, &left, &judge.run_patiently(case), self.options).is_empty() {
                found.clear();
            }
        }
        if !found.is_empty() && exempt(case, &left, &right, &self.left.steps(case)).is_some() {
            found.clear();
        }
        crate::native::note_nothing();
        (left, found)
    }

    /// A report for people: the code, then what differs, side by side.
    pub fn report(&self, case: &Case, found: &[Difference]) -> String {
        let mut text = String::new();
        if case.index == u64::MAX {
            text += "case by hand\n";
        } else {
            text += &format!("seed {} case {}\n", case.seed, case.index);
        }
        let mut rip = case.state.rip;
        for (bytes, listing) in case.code.iter().zip(case.listing()) {
            text += &format!("  {rip:08x}  {listing}\n");
            rip += bytes.len() as u64;
        }
        let wide = |f: fn(&Difference) -> &str, least: usize| {
            found.iter().map(|d| f(d).len()).max().unwrap_or(0).max(least)
        };
        let (a, b) = (wide(|d| &d.name, 4), wide(|d| &d.left, self.left.name().len()));
        text += &format!("  {:a$}  {:b$}  {}\n", "", self.left.name(), self.right.name());
        for d in &found[..found.len().min(SHOWN)] {
            text += &format!("  {:a$}  {:b$}  {}\n", d.name, d.left, d.right);
        }
        if found.len() > SHOWN {
            text += &format!("  and {} more\n", found.len() - SHOWN);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    fn outcome(stop: Stop) -> Outcome {
        Outcome { state: UserState::default(), selectors: SELECTORS, bases: [0; 2], stop, memory: Vec::new() }
    }

    fn names(left: &Outcome, right: &Outcome, options: Options) -> Vec<String> {
        let case = Case::new(CODE, vec![vec![0x90]]);
        differences(&case, left, right, options).into_iter().map(|d| d.name).collect()
    }

    #[test]
    fn flags_at_faults_are_compared_on_demand() {
        let left = outcome(Stop::Fault { vector: 13, error: 0, address: 0 });
        let mut right = left.clone();
        right.state.rflags |= 1;
        assert!(names(&left, &right, Options::default()).is_empty());
        assert_eq!(names(&left, &right, Options { exact_flags: true }), ["rflags"]);
        let left = outcome(Stop::Breakpoint);
        right.stop = Stop::Breakpoint;
        assert_eq!(names(&left, &right, Options::default()), ["rflags"]);
    }

    #[test]
    fn memory_is_compared_by_word() {
        let left = outcome(Stop::Breakpoint);
        let mut right = left.clone();
        let at = image_offset(0x2000_0040, 64).unwrap();
        let mut line: [u8; LINE] = base_image()[at..at + LINE].try_into().unwrap();
        line[17] ^= 1;
        right.memory.push((at, line));
        assert_eq!(names(&left, &right, Options::default()), ["[20000050]"]);
    }

    #[test]
    fn linux_hides_whether_high_pages_are_present() {
        let fault = |error, address| outcome(Stop::Fault { vector: 14, error, address });
        let high = 0xffff_8000_0000_0000;
        assert!(names(&fault(5, high), &fault(4, high), Options::default()).is_empty());
        assert_eq!(names(&fault(5, 8), &fault(4, 8), Options::default()), ["stop"]);
    }

    #[test]
    fn code_that_became_rdtsc_is_exempt() {
        let case = Case::new(CODE, vec![vec![0xf0, 0xce]]);
        let end = outcome(Stop::Breakpoint);
        let step = |start: &[u8]| {
            let mut bytes = [0x90; 15];
            bytes[..start.len()].copy_from_slice(start);
            [Step { rip: CODE, bytes, overwrote_itself: false }]
        };
        assert_eq!(exempt(&case, &end, &end, &step(&[0x48, 0x01, 0xc8])), None);
        assert!(exempt(&case, &end, &end, &step(&[0x0f, 0x31])).is_some());
        assert!(exempt(&case, &end, &end, &step(&[0x0f, 0x04])).is_some());
    }

    #[test]
    fn time_that_is_not_overwritten_is_exempt() {
        let code = [&[0x0f, 0x31][..], &[0xb8, 1, 0, 0, 0], &[0xba, 2, 0, 0, 0]];
        let case = Case::new(CODE, code.iter().map(|c| c.to_vec()).collect());
        let end = outcome(Stop::Breakpoint);
        let steps = |count: usize| {
            let mut rip = CODE;
            let step = |c: &[u8]| {
                let mut bytes = [0x90; 15];
                bytes[..c.len()].copy_from_slice(c);
                rip += c.len() as u64;
                Step { rip: rip - c.len() as u64, bytes, overwrote_itself: false }
            };
            code[..count].iter().copied().map(step).collect::<Vec<_>>()
        };
        assert_eq!(exempt(&case, &end, &end, &steps(3)), None);
        assert!(exempt(&case, &end, &end, &steps(2)).is_some());
        let mut rewritten = steps(3);
        rewritten[2].bytes[1] ^= 1;
        assert!(exempt(&case, &end, &end, &rewritten).is_some());
    }
}
