//! Two logs of a case side by side.
use super::case::at;
use super::generate::MSRS;
use super::harness::{CODE_BYTES, SUMS, UPPER};
use super::layout::*;
use super::machine::{names, Record};
use super::SystemCase;
use crate::state::Difference;
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic as M, Register};

/// RFLAGS that are compared.
const FLAGS: u64 = 0x3f_7fd7;
/// Virtual-8086 mode, which long mode has not.
const VM: u64 = 1 << 17;
/// Virtual interrupts enabled and pending.
const VIF: u64 = 3 << 19;
/// The resume flag.
const RF: u64 = 1 << 16;

/// Why a difference in one word of a record says nothing; None in nearly all
/// cases. `left` is QEMU's.
pub fn exempt(
    case: &SystemCase,
    name: &str,
    left: &Record,
    right: &Record,
    word: usize,
) -> Option<&'static str> {
    let (a, b) = (left[word], right[word]);
    match name {
        "fs base" | "gs base"
            if b == 0 && right[24] >> if name == "fs base" { 32 } else { 48 } & 0xffff == 0 =>
        {
            Some("the base that stays when IRET takes a segment away is not defined")
        }
        "rax" | "rdx" if left[0] == 1 && reads_time(case, left) => {
            Some("a single step shows the time-stamp counter, or what a port without a device gives")
        }
        "rflags" if a & FLAGS & !RF == b & FLAGS & !RF => {
            Some("QEMU pushes the resume flag as it was, processors set it at faults")
        }
        "error" if left[0] == 14 && left[2] == right[2] && left[23] == right[23] => {
            let reserved = if a & 8 != 0 { a | 1 } else { a };
            if reserved == b {
                return Some("QEMU clears P where a reserved bit is set");
            }
            (reserved | 2 == b).then_some("QEMU loads first where an instruction also stores")
        }
        "error" if left[0] == 13 && a & 7 == 2 && b >= 2 && a - 2 == (b - 2) * 2 => {
            Some("QEMU counts bytes of 64-bit gates in selector errors, processors vectors")
        }
        _ if UPPER.contains(&name) && a == b | 0x20 => {
            Some("QEMU sets accessed bits of upper levels before it knows that the access faults")
        }
        "ds-es-fs-gs" if null_levels(a, b) => {
            Some("QEMU takes segments away, and the level of null ones, at every 64-bit IRET")
        }
        "dr6"
            if (a ^ b) & !15 == 0
                && (0..4).all(|n| (a ^ b) >> n & 1 == 0 || right[37] >> (2 * n) & 3 == 0) =>
        {
            Some("whether a breakpoint that is not enabled shows in DR6 is not defined")
        }
        "cr2" if left[0] == 8 => Some("which word of an exception's frame faults first is not defined"),
        "rflags" if a & FLAGS & !(RF | VM | VIF) == b & FLAGS & !(RF | VM | VIF) => {
            Some("SYSRET loads VIF and VIP, not VM; QEMU's the other way round")
        }
        _ => None,
    }
}

/// Do four selectors differ in null ones only: in their level, or because
/// QEMU, the left side, took them away?
fn null_levels(a: u64, b: u64) -> bool {
    [0, 16, 32, 48].into_iter().all(|shift| {
        let (a, b) = (a >> shift & 0xffff, b >> shift & 0xffff);
        a == b || a < 4 && b < 4 || a == 0
    })
}

/// Why two logs part in this record without a fault of the right side; what
/// follows is not compared then. `left` is QEMU's, `before` what both agreed in.
pub fn parts(case: &SystemCase, before: &[Record], left: &Record, right: &Record) -> Option<&'static str> {
    for record in before.iter().chain([left, right]) {
        if record[0] < FINAL && record[6] < 4 && bits(case, record[3]) != 64 {
            return Some("a null stack segment outside 64-bit code is not defined");
        }
    }
    if left[0] == 11 && right[0] == 12 && left[1] == right[1] {
        return Some("QEMU has #NP where a stack segment is not present");
    }
    if left[0] == 13 && right[0] == 12 && right[1] == 0 {
        return Some("QEMU has #GP for stack addresses that are not canonical");
    }
    if left[0] == 14 && [12, 13].contains(&right[0]) && (0xffff_ff00..1 << 32).contains(&left[23]) {
        return Some("QEMU does not check segment limits");
    }
    let data = [0, 16, 32, 48].into_iter().map(|shift| right[24] >> shift & 0xffff);
    if matches!(right[0], 8 | 13)
        && right[1] == 0
        && bits(case, right[3]) != 64
        && !data.into_iter().all(|s| plain(case, s))
    {
        return Some("QEMU does not check data segments where they are used");
    }
    if right[0] == 12 && right[1] == 0 && bits(case, right[3]) != 64 && !plain(case, right[6]) {
        return Some("QEMU does not check stack segments where they are used");
    }
    let next_page = (right[23] | 0xfff).wrapping_add(1);
    let same = left[0] == 14 && right[0] == 14 && left[2] == right[2];
    if same && left[1] & 2 == 0 && right[1] & 2 != 0 && left[23] == next_page {
        return Some("QEMU loads all of what crosses a page end before it stores");
    }
    if left[0] == 1 && right[0] == 1 && behind(case, right, &[0xfb]) {
        return Some("QEMU does not trap a single step behind STI");
    }
    let smap = right[30] >> 21 & 1 == 1 && right[4] >> 18 & 1 == 1;
    if right[0] == 8 && smap {
        return Some("AC lets QEMU push the frame of an exception onto a user page");
    }
    let extra = left[36] & !right[36];
    let same = left[0] == right[0] && left[2] == right[2];
    if matches!(left[0], 1 | 8)
        && same
        && left[36] & 1 << 14 != 0
        && extra != 0
        && extra & !on_code(left) == 0
    {
        return Some("a single step shows the next instruction's breakpoint in QEMU");
    }
    if left[0] == 1 && left[2] >= HALF {
        return Some("QEMU meets breakpoints on data with accesses that then fault");
    }
    let missing = right[36] & !left[36] & 15;
    if left[0] == 1
        && right[0] == 1
        && left[2] == right[2]
        && missing & (on_code(right) | !enabled(right)) == 0
    {
        return Some("QEMU forgets what the first part of an access met when it comes to the second");
    }
    let string = instruction(case, left).filter(|i| i.is_string_instruction());
    if left[0] == 1 && right[0] == 1 && string.is_some_and(|i| right[2] == left[2] + i.len() as u64) {
        return Some("QEMU comes back to a repeated string operation that a breakpoint met at its end");
    }
    if matches!(left[0], 13 | 14) && right[0] == 6 && loose_extension(case, right) {
        return Some("QEMU does not look at all extensions of opcodes first");
    }
    if right[0] < FINAL && right[5].wrapping_sub(left[5]) == 0x1_0000 {
        return Some("QEMU takes the bytes that RET drops for a signed number");
    }
    let edge = (1 << 47) - 64..1 << 47;
    if left[0] == 14 && [12, 13].contains(&right[0]) && right[1] == 0 && edge.contains(&left[23]) {
        return Some("QEMU looks at the first byte alone where addresses stop being canonical");
    }
    let at_fault = [left, right].map(|r| instruction(case, r));
    let page_fault = |r: &Record| r[0] == 14;
    for (record, instruction) in [left, right].into_iter().zip(&at_fault) {
        let Some(i) = instruction else { continue };
        let far =
            matches!(i.flow_control(), FlowControl::Return | FlowControl::IndirectCall | FlowControl::Call)
                && is_far(i);
        if page_fault(left) && left[23] < 0x1_0000 && far && record[6] < 4 {
            return Some("QEMU pushes what far calls push as on a small stack if its segment is null");
        }
        if page_fault(record) && far && record[3] & 3 == 3 {
            return Some("QEMU reaches the stack of far branches and IRET with supervisor rights");
        }
        match i.mnemonic() {
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq if page_fault(left) && page_fault(right) => {
                return Some("QEMU reads the second operand of CMPS first, processors the first");
            }
            M::Pusha | M::Pushad if page_fault(left) && page_fault(right) => {
                return Some("QEMU stores the registers of PUSHA from the last to the first");
            }
            M::Rcl | M::Rcr if left[0] == right[0] && matches!(left[0], 13 | 14) => {
                return Some("QEMU loses the flags of rotations through carry that fault");
            }
            M::Rdmsr | M::Wrmsr
                if right[0] == 13 && ![&MSRS[..], &[0xc000_0080]].concat().contains(&(right[8] as u32)) =>
            {
                return Some("QEMU has no fault for MSRs that it lacks");
            }
            M::Sysenter if bits(case, record[3]) != 64 => {
                return Some("QEMU has SYSENTER in compatibility mode, AMD's processors have not");
            }
            M::Mov if left[0] == LOST && i.op0_register() == Register::CR0 => {
                return Some("QEMU leaves long mode whatever CR0 is given");
            }
            M::Mov if right[0] == 13 && right[1] == 0 && i.op0_register() == Register::SS => {
                return Some("QEMU does not look at the level of a null stack segment");
            }
            M::Mov
                if left[0] == 13 && right[0] == 6 && i.op0_register().is_dr() | i.op1_register().is_dr() =>
            {
                return Some("QEMU looks at the privilege level before CR4.DE");
            }
            M::Xsetbv if left[0] == 13 && right[0] == 6 => {
                return Some("QEMU looks at the privilege level before OSXSAVE");
            }
            M::Lldt if matches!(right[0], 8 | 13) => {
                return Some("QEMU does not look at the type in the upper half of an LDT's descriptor");
            }
            M::Ltr
                if matches!(right[0], 8 | 13)
                    && descriptor(case, (right[7] & 0xfff8) + 8) >> 40 & 0x1f == 0x10 =>
            {
                return Some("QEMU looks at four of the five bits that must be zero in a TSS's upper half");
            }
            M::Sysexit => return Some("AMD's processors look at the privilege level before the mode"),
            _ => {}
        }
    }
    None
}

/// Breakpoints that a record's DR7 enables, a bit each.
fn enabled(record: &Record) -> u64 {
    (0..4).filter(|n| record[37] >> (2 * n) & 3 != 0).fold(0, |bits, n| bits | 1 << n)
}

/// Breakpoints on code that a record's DR7 enables, a bit each.
fn on_code(record: &Record) -> u64 {
    let code = |n: &u64| record[37] >> (16 + 4 * n) & 3 == 0;
    enabled(record) & (0..4).filter(code).fold(0, |bits, n| bits | 1 << n)
}

/// Is this a single step in a slot with RDTSC or IN?
pub fn reads_time(case: &SystemCase, record: &Record) -> bool {
    let slot = case.slots.get(((record[2] & 0xfff) / SLOT) as usize);
    slot.is_some_and(|slot| {
        let input = [&[0xec][..], &[0xed], &[0x66, 0xed]];
        slot.starts_with(&[0x0f, 0x31])
            || slot.get(5..).is_some_and(|rest| input.iter().any(|bytes| rest.starts_with(bytes)))
    })
}

/// Do these bytes stand right before where a record's code was interrupted?
fn behind(case: &SystemCase, record: &Record, bytes: &[u8]) -> bool {
    let at = record[2].wrapping_sub(bytes.len() as u64);
    if ![CODE_USER, CODE_SUPERVISOR].contains(&(at & !0xfff)) {
        return false;
    }
    let slot = case.slots.get(((at & 0xfff) / SLOT) as usize);
    slot.is_some_and(|slot| slot.get((at % SLOT) as usize..).is_some_and(|rest| rest.starts_with(bytes)))
}

/// Did something fault that touches several pages? Which of them were looked
/// at before is visible in the accessed bits, and QEMU has its own order:
/// CMPS, and loads of both sides of a page end before stores. Far returns to an
/// inner level, which are refused, read all of the frame, in QEMU part of it.
fn several_pages(case: &SystemCase, log: &[Record]) -> bool {
    log.iter().any(|r| {
        let back = |i: Instruction| matches!(i.flow_control(), FlowControl::Return) && is_far(&i);
        if r[0] == 13 && r[5] & 0xfff > 0xfd8 && instruction(case, r).is_some_and(back) {
            return true;
        }
        // Whether the page of an instruction with a breakpoint was looked at is not defined.
        if r[0] != 14 {
            return r[0] == 1 && r[36] & on_code(r) != 0;
        }
        let strings = instruction(case, r)
            .is_some_and(|i| matches!(i.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq));
        strings || r[23].wrapping_add(8) & 0xfff < 16
    })
}

fn is_far(i: &Instruction) -> bool {
    matches!(i.mnemonic(), M::Retf | M::Iret | M::Iretd | M::Iretq)
        || matches!(
            i.code(),
            Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664 | Code::Call_ptr1616 | Code::Call_ptr1632
        )
}

/// The descriptor of the case that a selector names.
fn descriptor(case: &SystemCase, selector: u64) -> u64 {
    let index = (selector >> 3) as usize;
    let found = match selector & 4 {
        0 => case.words.get(at("gdt") + index).filter(|_| index < 32),
        _ => case.words.get(at("ldt") + index).filter(|_| index < 8),
    };
    found.copied().unwrap_or(0)
}

/// Does the selector name flat data that may be written?
fn plain(case: &SystemCase, selector: u64) -> bool {
    let d = descriptor(case, selector);
    let flat = d & 0xff00_00ff_ffff_0000 == 0 && d & 0x008f_0000_0000_ffff == 0x008f_0000_0000_ffff;
    selector > 3 && flat && d >> 40 & 0x9e == 0x92
}

/// Operand size of code under a selector of the case.
fn bits(case: &SystemCase, selector: u64) -> u32 {
    match descriptor(case, selector) >> 53 & 3 {
        1 | 3 => 64,
        2 => 32,
        _ => 16,
    }
}

/// The bytes that stand where a record's code was interrupted; none outside its page.
fn code_bytes(record: &Record) -> Option<[u8; 16]> {
    let words = [record[CODE_BYTES], record[CODE_BYTES + 1]];
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&words[0].to_le_bytes());
    bytes[8..].copy_from_slice(&words[1].to_le_bytes());
    (record[0] < FINAL && words != [0; 2]).then_some(bytes)
}

/// What stands where a record's code was interrupted.
fn instruction(case: &SystemCase, record: &Record) -> Option<Instruction> {
    let bytes = code_bytes(record)?;
    Some(Decoder::with_ip(bits(case, record[3]), &bytes, record[2], DecoderOptions::AMD).decode())
}

/// Does an opcode stand there whose extension is none of those that it has? QEMU takes it
/// for POP or MOV, or reads the operand first.
fn loose_extension(case: &SystemCase, record: &Record) -> bool {
    let Some(bytes) = code_bytes(record) else { return false };
    let wide = bits(case, record[3]) == 64;
    let prefix = |b: &u8| {
        matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
            || wide && (0x40..0x50).contains(b)
    };
    let mut rest = bytes.iter().skip_while(|b| prefix(b));
    match (rest.next(), rest.next()) {
        (Some(0x8f | 0xc6 | 0xc7), Some(b)) => b & 0x38 != 0,
        (Some(0xfe | 0xff), Some(b)) => b & 0x38 == 0x38,
        _ => false,
    }
}

/// Everything in which two logs of one case differ, up to the end of the first
/// record that does; empty when they agree.
pub fn differences(case: &SystemCase, left: &[Record], right: &[Record]) -> Vec<Difference> {
    let mut found = Vec::new();
    for (number, (a, b)) in left.iter().zip(right).enumerate() {
        let text = |v: u64| format!("{v:016x}");
        let mut ends = false;
        let names = if a[0] == b[0] { names(a[0]) } else { vec!["vector"] };
        for (word, name) in names.iter().enumerate() {
            if a[word] == b[word] {
                continue;
            }
            if exempt(case, name, a, b, word).is_some() {
                // It may be read again.
                ends |= *name == "dr6";
            } else {
                let place = format!("{number} {} {name}", kind(a[0]));
                found.push(Difference::new(place, text(a[word]), text(b[word])));
            }
        }
        if !found.is_empty() {
            let tables = a[0] == FINAL && found.iter().all(|d| d.name.ends_with("tables"));
            // How much of a frame that faults is written is not defined.
            let sums = found.iter().all(|d| SUMS.iter().any(|sum| d.name.ends_with(sum)));
            let frame = a[0] == FINAL && sums && left.iter().any(|r| r[0] == 8);
            if frame || parts(case, &right[..number], a, b).is_some() || tables && several_pages(case, left) {
                found.clear();
            }
            return found;
        }
        if ends {
            return found;
        }
    }
    if left.len() != right.len() {
        found.push(Difference::new("records", left.len().to_string(), right.len().to_string()));
    }
    found
}

fn kind(tag: u64) -> String {
    match tag {
        FINAL => "end".into(),
        LOST => "reset".into(),
        vector => format!("#{vector}"),
    }
}

/// A log for people, one line a record.
pub fn log_text(log: &[Record]) -> String {
    log.iter()
        .map(|r| match r[0] {
            FINAL | LOST => format!("    {}\n", kind(r[0])),
            _ => format!(
                "    {:5} error {:x} at {:x}:{:x} flags {:x} stack {:x}:{:x} cr2 {:x} dr6 {:x}\n",
                kind(r[0]),
                r[1],
                r[3],
                r[2],
                r[4],
                r[6],
                r[5],
                r[23],
                r[36]
            ),
        })
        .collect()
}
