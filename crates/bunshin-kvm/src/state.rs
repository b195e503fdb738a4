//! A processor's registers between the form of all engines and KVM's.
//!
//! The order of setting matters: control registers first (they say which others exist),
//! XCR0 before the vector state that it allows, APIC_BASE before the local APIC's page,
//! the page before the time-stamp deadline, events and the run state last.
use crate::clocks::msr;
use crate::refused;
use crate::vcpu::KvmVcpu;
use bunshin_core::state::{Event, EventKind, Segment, Table};
use bunshin_core::{CpuState, EngineError, Result};
use kvm_bindings::{
    kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave, Msrs, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW,
};

const EFER: u32 = 0xC000_0080;
const APIC_BASE: u32 = 0x1B;
const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6E0;
/// kvmclock: setting them writes to guest memory.
const WALL_CLOCK: u32 = 0x4B56_4D00;
/// Registers that a state carries, as in the other engines.
const CARRIED: [u32; 44] = [
    0x3B,
    0x174,
    0x175,
    0x176,
    0x1A0,
    0x1D9,
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20A,
    0x20B,
    0x20C,
    0x20D,
    0x20E,
    0x20F,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26A,
    0x26B,
    0x26C,
    0x26D,
    0x26E,
    0x26F,
    0x277,
    0x2FF,
    TSC_DEADLINE,
    0x4B56_4D01,
    WALL_CLOCK,
    0xC000_0081,
    0xC000_0082,
    0xC000_0083,
    0xC000_0084,
    0xC000_0102,
    0xC000_0103,
];
const XSAVE_LENGTH: usize = 4096;
/// Offsets in the local APIC's page.
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const SHADOW_STI: u8 = 1;

fn segment_out(k: &kvm_segment) -> Segment {
    let access = u32::from(k.type_ & 15)
        | u32::from(k.s & 1) << 4
        | u32::from(k.dpl & 3) << 5
        | u32::from(k.present & 1) << 7
        | u32::from(k.avl & 1) << 12
        | u32::from(k.l & 1) << 13
        | u32::from(k.db & 1) << 14
        | u32::from(k.g & 1) << 15
        | u32::from(k.unusable != 0) << 16;
    Segment { selector: k.selector, base: k.base, limit: k.limit, access }
}

fn segment_in(s: &Segment) -> kvm_segment {
    let bit = |n: u32| (s.access >> n & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.access & 15) as u8,
        present: bit(7),
        dpl: (s.access >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        // Null selectors too; a processor with VT-x insists on that.
        unusable: bit(16) | (1 - bit(7)),
        padding: 0,
    }
}

fn table_out(k: &kvm_dtable) -> Table {
    Table { base: k.base, limit: k.limit }
}

fn table_in(t: &Table) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

/// Copy a processor's state.
pub fn read(v: &KvmVcpu) -> Result<CpuState> {
    let fd = &v.fd;
    let regs = fd.get_regs().map_err(|e| refused("reading registers", e))?;
    let sregs = fd.get_sregs().map_err(|e| refused("reading control registers", e))?;
    let xsave = fd.get_xsave().map_err(|e| refused("reading vector registers", e))?;
    let debug = fd.get_debug_regs().map_err(|e| refused("reading debug registers", e))?;
    // It lets INIT and start-up IPIs that have come take effect, so it goes before events.
    let mp = fd.get_mp_state().map_err(|e| refused("reading the run state", e))?;
    let events = fd.get_vcpu_events().map_err(|e| refused("reading events", e))?;
    let lapic = fd.get_lapic().map_err(|e| refused("reading the local APIC", e))?;
    // KVM has XCR0 only for guests that were offered XSAVE.
    let xcr0 = fd.get_xcrs().ok().and_then(|x| x.xcrs.iter().find(|x| x.xcr == 0).map(|x| x.value));
    let mut msrs = read_msrs(v)?;
    msrs.push((EFER, sregs.efer));
    msrs.push((APIC_BASE, sregs.apic_base));
    msrs.sort_unstable();
    let tsc = msr_value(v, TSC).unwrap_or(0);
    let mut area: Vec<_> = xsave.region.iter().flat_map(|w| w.to_le_bytes()).collect();
    // Where processors leave room the kernel notes what it has saved.
    area[464..512].fill(0);
    let segments = [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs];
    Ok(CpuState {
        gpr: [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
            regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        rip: regs.rip,
        rflags: regs.rflags,
        segments: segments.map(|s| segment_out(&s)),
        ldt: segment_out(&sregs.ldt),
        tr: segment_out(&sregs.tr),
        gdt: table_out(&sregs.gdt),
        idt: table_out(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        xcr0: xcr0.unwrap_or(1),
        dr: [debug.db[0], debug.db[1], debug.db[2], debug.db[3], debug.dr6, debug.dr7],
        msrs,
        xsave: area,
        lapic: lapic.regs.iter().map(|&b| b as u8).collect(),
        tsc,
        halted: mp.mp_state == KVM_MP_STATE_HALTED,
        interrupt_shadow: events.interrupt.shadow != 0,
        nmi_blocked: events.nmi.masked != 0,
        waits_for_sipi: matches!(mp.mp_state, KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED),
        nmi_pending: events.nmi.pending != 0,
        event: event_out(&events),
    })
}

/// The event on its way to its handler. Those of INT n, INT3 and INTO are left out:
/// their instruction runs again.
fn event_out(e: &kvm_vcpu_events) -> Option<Event> {
    let soft_exception = matches!(e.exception.nr, 3 | 4);
    if (e.exception.injected != 0 || e.exception.pending != 0) && !soft_exception {
        let error = (e.exception.has_error_code != 0).then_some(e.exception.error_code);
        Some(Event { kind: EventKind::Exception, vector: e.exception.nr, error })
    } else if e.nmi.injected != 0 {
        Some(Event { kind: EventKind::Nmi, vector: 2, error: None })
    } else if e.interrupt.injected != 0 && e.interrupt.soft == 0 {
        Some(Event { kind: EventKind::Interrupt, vector: e.interrupt.nr, error: None })
    } else {
        None
    }
}

fn events_in(s: &CpuState) -> kvm_vcpu_events {
    let mut e = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    e.interrupt.shadow = if s.interrupt_shadow { SHADOW_STI } else { 0 };
    e.nmi.masked = s.nmi_blocked.into();
    e.nmi.pending = s.nmi_pending.into();
    match s.event {
        Some(Event { kind: EventKind::Exception, vector, error }) => {
            e.exception.injected = 1;
            e.exception.nr = vector;
            e.exception.has_error_code = error.is_some().into();
            e.exception.error_code = error.unwrap_or(0);
        }
        Some(Event { kind: EventKind::Nmi, .. }) => e.nmi.injected = 1,
        Some(Event { kind: EventKind::Interrupt, vector, .. }) => {
            e.interrupt.injected = 1;
            e.interrupt.nr = vector;
        }
        None => {}
    }
    e
}

fn msr_value(v: &KvmVcpu, index: u32) -> Option<u64> {
    let mut list = msr(index, 0);
    (v.fd.get_msrs(&mut list).ok()? == 1).then(|| list.as_slice()[0].data)
}

/// All carried registers that this KVM has.
fn read_msrs(v: &KvmVcpu) -> Result<Vec<(u32, u64)>> {
    let mut found = Vec::with_capacity(CARRIED.len() + 2);
    let mut wanted = &CARRIED[..];
    while !wanted.is_empty() {
        let entries: Vec<_> =
            wanted.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut list = Msrs::from_entries(&entries)
            .map_err(|_| EngineError::new("kvm", "KVM: the list of registers is too long"))?;
        let read = v.fd.get_msrs(&mut list).map_err(|e| refused("reading registers", e))?;
        found.extend(list.as_slice()[..read].iter().map(|e| (e.index, e.data)));
        // One that it does not have ends the call.
        wanted = wanted.get(read + 1..).unwrap_or(&[]);
    }
    Ok(found)
}

fn write_msrs(v: &KvmVcpu, msrs: &[(u32, u64)]) -> Result<()> {
    let mut left = msrs;
    while !left.is_empty() {
        let entries: Vec<_> =
            left.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let list = Msrs::from_entries(&entries)
            .map_err(|_| EngineError::new("state", format!("{} registers are too many", entries.len())))?;
        let set = v.fd.set_msrs(&list).map_err(|e| refused("setting registers", e))?;
        let Some(&(index, data)) = left.get(set) else { break };
        // A register that this KVM does not have may hold what those without it read.
        if data != 0 && msr_value(v, index) != Some(data) {
            return Err(EngineError::new(
                "state",
                format!("model-specific register {index:#x} does not take {data:#x} in KVM on this host"),
            ));
        }
        left = &left[set + 1..];
    }
    Ok(())
}

/// What firmware would have set, as the other engines have it after RESET#.
pub fn power_up(v: &KvmVcpu) -> Result<()> {
    const FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F];
    let mut msrs: Vec<_> = FIXED.iter().map(|&index| (index, 0x0606_0606_0606_0606)).collect();
    msrs.push((0x2FF, 0x806));
    write_msrs(v, &msrs)
}

/// Replace a processor's state.
pub fn write(v: &mut KvmVcpu, s: &CpuState) -> Result<()> {
    let bad = |what: String| EngineError::new("state", what);
    if !s.xsave.is_empty() && (s.xsave.len() < 576 || s.xsave.len() > XSAVE_LENGTH) {
        return Err(bad(format!("xsave area of {} bytes, expected 0 or 576 to 4096", s.xsave.len())));
    }
    if !s.lapic.is_empty() && s.lapic.len() != 1024 {
        return Err(bad(format!("local APIC's page of {} bytes, expected 0 or 1024", s.lapic.len())));
    }
    set_control(v, s)?;
    set_general(v, s)?;
    vectors(v, s)?;
    set_debug(v, s)?;
    // Those of the FPU and the clock are elsewhere; the deadline needs the page.
    let plain: Vec<_> = s
        .msrs
        .iter()
        .filter(|m| !matches!(m.0, EFER | APIC_BASE | TSC | TSC_DEADLINE))
        // A wall clock that nobody asked for is not to be written.
        .filter(|m| m.0 != WALL_CLOCK || m.1 != 0)
        .copied()
        .collect();
    write_msrs(v, &plain)?;
    if !s.lapic.is_empty() {
        let mut page = kvm_lapic_state::default();
        page.regs.iter_mut().zip(&s.lapic).for_each(|(to, &from)| *to = from as _);
        tame_timer(&mut page);
        v.fd.set_lapic(&page).map_err(|e| refused("setting the local APIC", e))?;
    }
    if let Some(deadline) = value(s, TSC_DEADLINE) {
        write_msrs(v, &[(TSC_DEADLINE, deadline)])?;
    }
    if s.tsc != 0 {
        let offset = s.tsc.wrapping_sub(bunshin_core::clock::rdtsc());
        crate::clocks::set_tsc_offset(&v.fd, offset)?;
    }
    v.fd.set_vcpu_events(&events_in(s)).map_err(|e| refused("setting events", e))?;
    let mp_state = if s.waits_for_sipi {
        KVM_MP_STATE_INIT_RECEIVED
    } else if s.halted {
        KVM_MP_STATE_HALTED
    } else {
        KVM_MP_STATE_RUNNABLE
    };
    v.fd.set_mp_state(kvm_mp_state { mp_state }).map_err(|e| refused("setting the run state", e))
}

fn value(s: &CpuState, index: u32) -> Option<u64> {
    s.msrs.iter().find(|m| m.0 == index).map(|m| m.1)
}

fn set_control(v: &KvmVcpu, s: &CpuState) -> Result<()> {
    let before = v.fd.get_sregs().map_err(|e| refused("reading control registers", e))?;
    let efer = value(s, EFER).unwrap_or(0);
    let sregs = control(s, efer, value(s, APIC_BASE).unwrap_or(before.apic_base));
    v.fd.set_sregs(&sregs).map_err(|e| refused("setting control registers", e))
}

fn set_general(v: &KvmVcpu, s: &CpuState) -> Result<()> {
    let g = &s.gpr;
    let regs = kvm_regs {
        rax: g[0],
        rcx: g[1],
        rdx: g[2],
        rbx: g[3],
        rsp: g[4],
        rbp: g[5],
        rsi: g[6],
        rdi: g[7],
        r8: g[8],
        r9: g[9],
        r10: g[10],
        r11: g[11],
        r12: g[12],
        r13: g[13],
        r14: g[14],
        r15: g[15],
        rip: s.rip,
        rflags: s.rflags | 2,
    };
    v.fd.set_regs(&regs).map_err(|e| refused("setting registers", e))
}

fn set_debug(v: &KvmVcpu, s: &CpuState) -> Result<()> {
    let debug = kvm_debugregs {
        db: [s.dr[0], s.dr[1], s.dr[2], s.dr[3]],
        dr6: s.dr[4],
        dr7: s.dr[5],
        ..Default::default()
    };
    v.fd.set_debug_regs(&debug).map_err(|e| refused("setting debug registers", e))
}

/// As `KvmVcpu::put_back`.
pub fn put_back(v: &KvmVcpu, before: &CpuState, after: &CpuState) -> Result<()> {
    let control = |s: &CpuState| {
        (s.segments, s.ldt, s.tr, s.gdt, s.idt, s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, value(s, EFER))
    };
    if control(before) != control(after) {
        set_control(v, after)?;
    }
    set_general(v, after)?;
    if (before.xcr0, &before.xsave) != (after.xcr0, &after.xsave) {
        vectors(v, after)?;
    }
    if before.dr != after.dr {
        set_debug(v, after)?;
    }
    let changed: Vec<_> = after
        .msrs
        .iter()
        .filter(|m| !matches!(m.0, EFER | APIC_BASE) && value(before, m.0).is_some_and(|old| old != m.1))
        .copied()
        .collect();
    if !changed.is_empty() {
        write_msrs(v, &changed)?;
    }
    let events = |s: &CpuState| (s.interrupt_shadow, s.nmi_blocked, s.event);
    if events(before) != events(after) {
        let mut e = events_in(after);
        // One may have come meanwhile.
        e.flags &= !KVM_VCPUEVENT_VALID_NMI_PENDING;
        v.fd.set_vcpu_events(&e).map_err(|e| refused("setting events", e))?;
    }
    if after.halted {
        let mp_state = KVM_MP_STATE_HALTED;
        v.fd.set_mp_state(kvm_mp_state { mp_state }).map_err(|e| refused("setting the run state", e))?;
    }
    Ok(())
}

/// FPU and vector registers, and which of them XCR0 turns on.
fn vectors(v: &KvmVcpu, s: &CpuState) -> Result<()> {
    let mut xsave = kvm_xsave::default();
    let mut bytes = [0; XSAVE_LENGTH];
    if s.xsave.is_empty() {
        bytes[..2].copy_from_slice(&0x37F_u16.to_le_bytes());
        bytes[24..28].copy_from_slice(&0x1F80_u32.to_le_bytes());
        bytes[512] = 3;
    } else {
        bytes[..s.xsave.len()].copy_from_slice(&s.xsave);
        // A header in standard form has no more than the first word; what a processor
        // faults on is not state.
        bytes[520..576].fill(0);
        bytes[26..28].fill(0);
    }
    for (word, four) in xsave.region.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
    }
    if s.xcr0 > 1 {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = s.xcr0;
        v.fd.set_xcrs(&xcrs).map_err(|e| refused(format!("setting XCR0 to {:#x}", s.xcr0), e))?;
    }
    // SAFETY: the area has the size that KVM reads; AMX, the only larger one, is not offered.
    unsafe { v.fd.set_xsave(&xsave) }.map_err(|e| refused("setting vector registers", e))
}

fn control(s: &CpuState, efer: u64, apic_base: u64) -> kvm_sregs {
    let seg = |n: usize| segment_in(&s.segments[n]);
    // LMA follows from the rest.
    let lma = if efer & 0x100 != 0 && s.cr0 >> 31 & 1 == 1 { 0x400 } else { 0 };
    kvm_sregs {
        es: seg(0),
        cs: seg(1),
        ss: seg(2),
        ds: seg(3),
        fs: seg(4),
        gs: seg(5),
        ldt: segment_in(&s.ldt),
        tr: segment_in(&s.tr),
        gdt: table_in(&s.gdt),
        idt: table_in(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: efer & !0x400 | lma,
        apic_base,
        interrupt_bitmap: [0; 4],
    }
}

fn word(page: &kvm_lapic_state, at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|n| page.regs[at + n] as u8))
}

/// KVM fires a one-shot timer anew whose count has run out: it has fired, so it gets
/// no count.
fn tame_timer(page: &mut kvm_lapic_state) {
    let one_shot = word(page, LVT_TIMER) >> 17 & 3 == 0;
    if one_shot && word(page, CURRENT_COUNT) == 0 {
        page.regs[INITIAL_COUNT..INITIAL_COUNT + 4].fill(0);
    }
}

/// Let the deadline of the local APIC's timer follow the time-stamp counter after it
/// was moved. Counts go on with the host's time: they may come early after a pause.
pub fn rearm(v: &mut KvmVcpu) {
    if let Some(deadline) = msr_value(v, TSC_DEADLINE).filter(|&d| d != 0) {
        let _ = v.fd.set_msrs(&msr(TSC_DEADLINE, deadline));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_come_back_as_they_were() {
        assert_eq!(segment_in(&Segment::default()).unusable, 1);
        for access in [0xC09B, 0xA09B, 0x8B, 0x1_0082, 0xC0F3, 0x1093] {
            let s = Segment { selector: 0x33, base: 0x1234_5678_9ABC, limit: 0xF_FFFF, access };
            assert_eq!(segment_out(&segment_in(&s)), s, "{access:#x}");
        }
    }

    #[test]
    fn events_come_back_as_they_were() {
        let kinds = [
            (EventKind::Exception, 14, Some(7)),
            (EventKind::Exception, 6, None),
            (EventKind::Interrupt, 0xEC, None),
            (EventKind::Nmi, 2, None),
        ];
        for (kind, vector, error) in kinds {
            let event = Some(Event { kind, vector, error });
            let s = CpuState { event, nmi_pending: true, interrupt_shadow: true, ..CpuState::default() };
            let e = events_in(&s);
            assert_eq!(event_out(&e), event);
            assert_eq!((e.nmi.pending, e.interrupt.shadow), (1, 1));
        }
        // INT 0x80 under way runs again.
        let mut e = kvm_vcpu_events::default();
        (e.interrupt.injected, e.interrupt.nr, e.interrupt.soft) = (1, 0x80, 1);
        assert_eq!(event_out(&e), None);
    }

    #[test]
    fn a_one_shot_that_has_fired_does_not_fire_again() {
        let mut page = kvm_lapic_state::default();
        page.regs[INITIAL_COUNT] = 9;
        tame_timer(&mut page);
        assert_eq!(word(&page, INITIAL_COUNT), 0);
        page.regs[INITIAL_COUNT] = 9;
        page.regs[CURRENT_COUNT] = 4;
        tame_timer(&mut page);
        assert_eq!(word(&page, INITIAL_COUNT), 9);
        // Periodic ones go on.
        page.regs[CURRENT_COUNT] = 0;
        page.regs[LVT_TIMER + 2] = 2;
        tame_timer(&mut page);
        assert_eq!(word(&page, INITIAL_COUNT), 9);
    }
}
