//! The interrupt controllers and the PIT of the host's kernel, in and out, in the form
//! that all engines share.
//!
//! Spec: Linux arch/x86/include/uapi/asm/kvm.h; KVM_GET_IRQCHIP, KVM_GET_PIT2 and their
//! kin in api.rst.
//!
//! What KVM does not tell, or does not take:
//! - when the PIT's channel 0 was started. It starts over when it comes or goes, so its
//!   next interrupt is up to a period late; one that a one-shot count has given already
//!   may be given twice, but none is lost.
//! - levels of the IOAPIC's inputs: the engine remembers what it was told.
//! - counts of channels 1 and 2: they start over from what was left.
use crate::refused;
use bunshin_core::chips::pic::{Chip, Pic};
use bunshin_core::chips::pit::{self, Channel, Pit};
use bunshin_core::chips::{ChipsState, Ioapic, IOAPIC_GPA};
use bunshin_core::{clock, EngineError, Result};
use kvm_bindings::{
    kvm_ioapic_state, kvm_irqchip, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_FLAGS_SPEAKER_DATA_ON,
};
use kvm_ioctls::VmFd;

const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Bits of a redirection entry that exist; delivery status comes and goes by itself.
const ENTRY: u64 = 0xFF00_0000_0001_EFFF;
/// Inputs whose trigger mode can be chosen, master and slave.
const ELCR: [u8; 2] = [0xF8, 0xDE];
/// A channel that has never been programmed.
const IDLE: u8 = 0xFF;
/// Channel 0 in this mode counts and gives no interrupts.
const SILENT: u8 = 5;
/// Which byte of a count is next, and of which form.
const LOW: u8 = 1;
const HIGH: u8 = 2;
const LOW_FIRST: u8 = 3;
const HIGH_SECOND: u8 = 4;

fn get(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(|e| refused("reading an interrupt controller", e))?;
    Ok(chip)
}

/// Copy the chips. `levels` are the lines that devices assert, by gsi.
pub fn read(vm: &VmFd, levels: u32) -> Result<ChipsState> {
    // SAFETY: plain numbers; the kernel filled the member that `chip_id` names.
    let (master, slave, ioapic) = unsafe {
        (
            get(vm, KVM_IRQCHIP_PIC_MASTER)?.chip.pic,
            get(vm, KVM_IRQCHIP_PIC_SLAVE)?.chip.pic,
            get(vm, KVM_IRQCHIP_IOAPIC)?.chip.ioapic,
        )
    };
    let timer = vm.get_pit2().map_err(|e| refused("reading the PIT", e))?;
    Ok(ChipsState {
        clock_ns: clock::now_ns(),
        lapics: Vec::new(),
        ioapic: ioapic_out(&ioapic, levels),
        pic: Pic { master: pic_out(&master, ELCR[0]), slave: pic_out(&slave, ELCR[1]) },
        pit: pit_out(&timer),
    })
}

/// Replace the chips. Returns the lines, by gsi, whose level must be told anew.
pub fn write(vm: &VmFd, state: &ChipsState) -> Result<u32> {
    let now = clock::now_ns();
    // The saved clock reads `now` now.
    let to = |ns: u64| now.saturating_sub(state.clock_ns.saturating_sub(ns));
    let put = |chip_id, name: &str, fill: &dyn Fn(&mut kvm_irqchip)| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        fill(&mut chip);
        vm.set_irqchip(&chip).map_err(|e| refused(format!("setting the {name}"), e))
    };
    put(KVM_IRQCHIP_PIC_MASTER, "PIC", &|c| c.chip.pic = pic_in(&state.pic.master, ELCR[0]))?;
    put(KVM_IRQCHIP_PIC_SLAVE, "PIC", &|c| c.chip.pic = pic_in(&state.pic.slave, ELCR[1]))?;
    let ioapic = ioapic_in(&state.ioapic);
    put(KVM_IRQCHIP_IOAPIC, "IOAPIC", &|c| c.chip.ioapic = ioapic)?;
    if state.pit.channels.iter().any(|c| c.mode > 5 || c.reload > 0x1_0000) {
        return Err(EngineError::new(
            "state",
            "a channel of the PIT has a mode or count that does not exist",
        ));
    }
    vm.set_pit2(&pit_in(&state.pit, now, to)).map_err(|e| refused("setting the PIT", e))?;
    // An edge that was told before would be one more.
    let tell = |pin: u32| state.ioapic.entries[pin as usize] & (LEVEL | MASKED) != 0;
    let lines = state.ioapic.lines;
    Ok((0..24).filter(|&pin| lines >> pin & 1 == 1 && tell(pin)).fold(0, |all, pin| all | 1 << gsi(pin)))
}

/// The gsi whose line is at an IOAPIC pin: the PIT's is at pin 2.
fn gsi(pin: u32) -> u32 {
    if pin == 2 {
        0
    } else {
        pin
    }
}

fn ioapic_out(k: &kvm_ioapic_state, levels: u32) -> Ioapic {
    let mut lines = levels & 0x00FF_FFFA;
    lines |= (levels & 1) << 2;
    // SAFETY: a union of one number's bits.
    let entries = std::array::from_fn(|pin| unsafe { k.redirtbl[pin].bits } & ENTRY);
    Ioapic { id: (k.id & 15) as u8, select: k.ioregsel as u8, entries, lines }
}

fn ioapic_in(io: &Ioapic) -> kvm_ioapic_state {
    let mut k = kvm_ioapic_state {
        base_address: IOAPIC_GPA,
        ioregsel: io.select.into(),
        id: io.id.into(),
        ..Default::default()
    };
    for (entry, &bits) in k.redirtbl.iter_mut().zip(&io.entries) {
        entry.bits = bits & ENTRY;
    }
    k
}

fn pic_out(k: &kvm_pic_state, choice: u8) -> Chip {
    Chip {
        irr: k.irr,
        isr: k.isr,
        imr: k.imr,
        lines: k.last_irr,
        elcr: k.elcr & choice,
        base: k.irq_base & 0xF8,
        first: k.priority_add & 7,
        icw: if matches!(k.init_state, 1..=3) { k.init_state + 1 } else { 0 },
        icw4: k.init4 != 0,
        single: false,
        read_isr: k.read_reg_select != 0,
        poll: k.poll != 0,
        special_mask: k.special_mask != 0,
        special_nested: k.special_fully_nested_mode != 0,
        auto_eoi: k.auto_eoi != 0,
        rotate_auto: k.rotate_on_auto_eoi != 0,
    }
}

fn pic_in(c: &Chip, choice: u8) -> kvm_pic_state {
    kvm_pic_state {
        last_irr: c.lines,
        irr: c.irr,
        imr: c.imr,
        isr: c.isr,
        priority_add: c.first,
        irq_base: c.base,
        read_reg_select: c.read_isr.into(),
        poll: c.poll.into(),
        special_mask: c.special_mask.into(),
        init_state: c.icw.saturating_sub(1),
        auto_eoi: c.auto_eoi.into(),
        rotate_on_auto_eoi: c.rotate_auto.into(),
        special_fully_nested_mode: c.special_nested.into(),
        init4: c.icw4.into(),
        elcr: c.elcr & choice,
        elcr_mask: choice,
    }
}

fn pit_out(k: &kvm_pit_state2) -> Pit {
    let channels: [Channel; 3] = std::array::from_fn(|n| channel_out(&k.channels[n], n == 0));
    let speaker = u8::from(k.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0) << 1;
    let port61 = u8::from(channels[2].gate) | speaker;
    Pit { channels, port61 }
}

fn channel_out(k: &kvm_pit_channel_state, first: bool) -> Channel {
    let gate = first || k.gate != 0;
    if k.mode > 5 {
        return Channel::new(gate);
    }
    let mut c = Channel::new(gate);
    c.mode = k.mode;
    c.bcd = k.bcd != 0;
    c.access = k.rw_mode.clamp(LOW, LOW_FIRST);
    c.reload = k.count.clamp(1, 0x1_0000);
    c.loaded = true;
    c.running = true;
    c.start_ns = if first { clock::now_ns() } else { u64::try_from(k.count_load_time).unwrap_or(0) };
    if !gate && !matches!(c.mode, 1 | 5) {
        c.held = Some(0);
    }
    c.write_low = (k.write_state == HIGH_SECOND).then_some(k.write_latch);
    c.read_high = k.read_state == HIGH_SECOND;
    c.latch = (k.count_latched != 0).then_some(k.latched_count);
    c.status = (k.status_latched != 0).then_some(k.status);
    c
}

fn pit_in(p: &Pit, now: u64, to: impl Fn(u64) -> u64) -> kvm_pit_state2 {
    let mut k = kvm_pit_state2::default();
    for (n, channel) in p.channels.iter().enumerate() {
        let mut c = channel.clone();
        c.start_ns = to(c.start_ns);
        k.channels[n] = channel_in(&c, n == 0, now);
    }
    if p.port61 & 2 != 0 {
        k.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    }
    k
}

fn channel_in(c: &Channel, first: bool, now: u64) -> kvm_pit_channel_state {
    let done = c.elapsed(now);
    let once = !c.periodic();
    let over = c.running && once && done >= u64::from(c.reload);
    // What is left of a count that is not repeated.
    let count = match c.running && once {
        true => u64::from(c.reload).saturating_sub(done).max(1) as u32,
        false => c.reload,
    };
    let mode = if !c.loaded {
        IDLE
    } else if first && (over || c.edges != 0 && once) {
        SILENT
    } else {
        c.mode
    };
    kvm_pit_channel_state {
        count,
        latched_count: c.latch.unwrap_or(0),
        count_latched: c.latch.map_or(0, |_| if c.access == LOW_FIRST { LOW_FIRST } else { c.access }),
        status_latched: c.status.is_some().into(),
        status: c.status.unwrap_or(0),
        read_state: half(c.access, c.read_high),
        write_state: half(c.access, c.write_low.is_some()),
        write_latch: c.write_low.unwrap_or(0),
        rw_mode: c.access,
        mode,
        bcd: c.bcd.into(),
        gate: c.gate.into(),
        // Replaced by KVM with the time of the call.
        count_load_time: i64::try_from(now).unwrap_or(i64::MAX),
    }
}

/// The next byte of a count, by how it is accessed.
fn half(access: u8, second: bool) -> u8 {
    match access {
        LOW => LOW,
        HIGH => HIGH,
        _ if second => HIGH_SECOND,
        _ => LOW_FIRST,
    }
}

const _: () = assert!(pit::HZ == 1_193_182, "KVM's PIT and ours count at one rate");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pic_comes_back_as_it_was() {
        let chip = Chip {
            irr: 0x11,
            isr: 2,
            imr: 0xF0,
            lines: 0x31,
            elcr: 0x20,
            base: 0x30,
            first: 3,
            icw: 3,
            icw4: true,
            read_isr: true,
            special_mask: true,
            rotate_auto: true,
            ..Chip::default()
        };
        assert_eq!(pic_out(&pic_in(&chip, 0xF8), 0xF8), chip);
        // A choice that hardware does not have is dropped.
        let odd = Chip { elcr: 0xFF, ..chip };
        assert_eq!(pic_out(&pic_in(&odd, 0xDE), 0xDE).elcr, 0xDE);
    }

    #[test]
    fn an_ioapic_comes_back_as_it_was() {
        let mut io = Ioapic { id: 5, select: 0x12, entries: [MASKED; 24], lines: 1 << 2 | 1 << 9 };
        io.entries[9] = 0xC031 | 3 << 56;
        io.entries[2] = 0x30;
        let back = ioapic_out(&ioapic_in(&io), 1 | 1 << 9);
        assert_eq!(back, io);
    }

    #[test]
    fn one_shot_counts_go_on_with_what_is_left_and_do_not_come_twice() {
        let ms = 1_000_000;
        let mut c = Channel { loaded: true, running: true, reload: 11_932, mode: 0, ..Channel::new(true) };
        c.start_ns = 100 * ms;
        let k = channel_in(&c, true, 105 * ms);
        assert!((5_960..5_975).contains(&k.count), "half of 10 ms is left: {}", k.count);
        assert_eq!(k.mode, 0);
        assert_eq!(channel_in(&c, true, 115 * ms).mode, SILENT);
        let speaker = channel_in(&c, false, 115 * ms);
        assert_eq!((speaker.mode, speaker.count), (0, 1), "OUT is high at once");
        c.mode = 2;
        let k = channel_in(&c, true, 115 * ms);
        assert_eq!((k.mode, k.count), (2, 11_932), "a period stays a period");
        assert_eq!(channel_in(&Channel::new(true), true, 0).mode, IDLE);
    }

    #[test]
    fn halves_of_counts_and_latches_survive() {
        let mut c = Channel { loaded: true, running: true, mode: 2, ..Channel::new(true) };
        c.write_low = Some(0x34);
        c.read_high = true;
        c.latch = Some(0x1234);
        c.status = Some(0x56);
        let back = channel_out(&channel_in(&c, false, 0), false);
        assert_eq!((back.write_low, back.read_high), (Some(0x34), true));
        assert_eq!((back.latch, back.status), (Some(0x1234), Some(0x56)));
    }
}
