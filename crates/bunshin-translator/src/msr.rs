//! Model-specific registers. An unknown one raises #GP, as on a processor.
//!
//! kvmclock (MSRs 4B564D00, 4B564D01; Linux Documentation/virt/kvm/x86/msr.rst)
//! gives the guest its TSC rate and the time of day without calibration.
use crate::mmu::canonical;
use crate::shared::Moment;
use crate::vcpu::Vcpu;
use bunshin_core::{clock, Times};
use std::sync::atomic::{fence, Ordering};

pub const EFER: u32 = 0xc000_0080;
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// Registers that are only remembered.
#[derive(Debug, Clone)]
pub struct Msrs {
    pub pat: u64,
    pub tsc_aux: u64,
    pub misc_enable: u64,
    pub mtrr_def: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_var: [u64; 16],
    pub kvm_time: u64,
    pub kvm_wall: u64,
    pub tsc_adjust: u64,
    pub feature_control: u64,
    pub debugctl: u64,
    pub mcg_status: u64,
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            pat: PAT_RESET,
            tsc_aux: 0,
            misc_enable: 1,
            mtrr_def: 0x806,
            mtrr_fixed: [0x0606_0606_0606_0606; 11],
            mtrr_var: [0; 16],
            kvm_time: 0,
            kvm_wall: 0,
            tsc_adjust: 0,
            feature_control: 1,
            debugctl: 0,
            mcg_status: 0,
        }
    }
}

const FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

/// Indices that `CpuState` carries.
pub const SAVED: [u32; 28] = [
    0x10,
    0x3b,
    0x174,
    0x175,
    0x176,
    0x277,
    0x2ff,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
    0xc000_0103,
    0x1a0,
    0x4b56_4d00,
    0x4b56_4d01,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
];

/// Nanoseconds that the time-stamp counter takes for `ticks`.
fn ns_of(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000_000 / u128::from(clock::tsc_hz())) as u64
}

impl Vcpu {
    /// RDMSR; None is #GP.
    pub fn read_msr(&mut self, n: u32) -> Option<u64> {
        if let Some(r) = self.chips.msr_read(self.index, n) {
            return r.ok();
        }
        let c = self.cpu();
        let m = &self.msrs;
        Some(match n {
            0x10 => self.tsc(),
            0x3b => m.tsc_adjust,
            0x3a => m.feature_control,
            0x8b | 0x17 | 0xc001_0010 | 0xc001_001f | 0xc001_1029 => 0,
            // HWCR: the counter runs at the rate of P0.
            0xc001_0015 => 1 << 24,
            0xfe => 8 | 1 << 8 | 1 << 10,
            0x174..=0x176 => c.sysenter[(n - 0x174) as usize],
            0x179 => 0,
            0x17a => m.mcg_status,
            0xda0 => 0,
            0x1a0 => m.misc_enable,
            0x1d9 => m.debugctl,
            0x1db..=0x1de => 0,
            0x200..=0x20f => m.mtrr_var[(n - 0x200) as usize],
            0x250 | 0x258 | 0x259 | 0x268..=0x26f => m.mtrr_fixed[FIXED.iter().position(|&x| x == n)?],
            0x277 => m.pat,
            0x2ff => m.mtrr_def,
            EFER => c.efer,
            0xc000_0081 => c.star,
            0xc000_0082 => c.lstar,
            0xc000_0083 => c.cstar,
            0xc000_0084 => c.sfmask,
            0xc000_0100 => c.seg_base[4],
            0xc000_0101 => c.seg_base[5],
            0xc000_0102 => c.kernel_gs_base,
            0xc000_0103 => m.tsc_aux,
            0x4b56_4d00 => m.kvm_wall,
            0x4b56_4d01 => m.kvm_time,
            _ => return None,
        })
    }

    /// WRMSR; None is #GP.
    pub fn write_msr(&mut self, n: u32, x: u64) -> Option<()> {
        if let Some(r) = self.chips.msr_write(self.index, n, x) {
            return r.ok();
        }
        let address = || canonical(x).then_some(x);
        match n {
            0x10 => {
                // The adjustment tells by how much it was moved.
                let by = x.wrapping_sub(self.tsc());
                self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(by);
                let offset = x.wrapping_sub(self.chips.clock.tsc());
                self.set_tsc_offset(offset);
            }
            0x3b => {
                let by = x.wrapping_sub(self.msrs.tsc_adjust);
                self.msrs.tsc_adjust = x;
                let offset = self.cpu().tsc_offset.wrapping_add(by);
                self.set_tsc_offset(offset);
            }
            0x8b | 0x79 | 0xc001_0015 | 0xc001_001f | 0xc001_1029 => {}
            0x174 => self.cpu_mut().sysenter[0] = x,
            0x175 | 0x176 => self.cpu_mut().sysenter[(n - 0x174) as usize] = address()?,
            0x17a => self.msrs.mcg_status = x,
            0xda0 if x == 0 => {}
            0x1a0 => self.msrs.misc_enable = x,
            0x1d9 => self.msrs.debugctl = x & 3,
            0x200..=0x20f => self.msrs.mtrr_var[(n - 0x200) as usize] = x,
            0x250 | 0x258 | 0x259 | 0x268..=0x26f => {
                self.msrs.mtrr_fixed[FIXED.iter().position(|&f| f == n)?] = x;
            }
            0x277 => {
                if (0..8).any(|k| matches!((x >> (8 * k)) & 0xff, 2 | 3 | 8..)) {
                    return None;
                }
                self.msrs.pat = x;
            }
            0x2ff => self.msrs.mtrr_def = x & 0xcff,
            EFER => {
                let c = self.cpu_mut();
                if x & !0xd01 != 0 || (c.efer ^ x) & 0x100 != 0 && c.cr0 & (1 << 31) != 0 {
                    return None;
                }
                let old = c.efer;
                c.efer = (x & !0x400) | (old & 0x400);
                if (old ^ x) & crate::mmu::EFER_NXE != 0 {
                    self.flush_tlb_all();
                }
            }
            0xc000_0081 => self.cpu_mut().star = x,
            0xc000_0082 => self.cpu_mut().lstar = address()?,
            0xc000_0083 => self.cpu_mut().cstar = address()?,
            0xc000_0084 => self.cpu_mut().sfmask = x & 0xffff_ffff,
            0xc000_0100 => self.cpu_mut().seg_base[4] = address()?,
            0xc000_0101 => self.cpu_mut().seg_base[5] = address()?,
            0xc000_0102 => self.cpu_mut().kernel_gs_base = address()?,
            0xc000_0103 => self.msrs.tsc_aux = x & 0xffff_ffff,
            0x4b56_4d00 => {
                self.msrs.kvm_wall = x;
                if x != 0 {
                    self.write_wall_clock(x);
                }
            }
            0x4b56_4d01 => {
                self.msrs.kvm_time = x;
                self.write_kvm_clock();
            }
            _ => return None,
        }
        Some(())
    }

    pub fn set_tsc_offset(&mut self, offset: u64) {
        self.cpu_mut().tsc_offset = offset;
        self.chips.set_tsc_offset(self.index, offset as i64);
        self.write_kvm_clock();
    }

    /// As `bunshin_core::Vcpu::times`.
    pub fn guest_times(&self) -> Times {
        Times { tsc_offset: self.cpu().tsc_offset, system_ns: self.start.system_ns, at: self.start.tsc }
    }

    /// As `bunshin_core::Vcpu::set_times`.
    pub fn set_guest_times(&mut self, times: &Times) {
        let clock = &self.chips.clock;
        let ago = ns_of(clock.tsc().saturating_sub(times.at));
        let now = clock.now_ns();
        self.start = Moment { tsc: times.at, ns: now.saturating_sub(ago), system_ns: times.system_ns };
        self.set_tsc_offset(times.tsc_offset);
    }

    /// As `bunshin_core::Vcpu::skip_time`.
    pub fn skip_time(&mut self, ticks: u64) {
        // The guest's counter and its system time go on where they were, so what
        // `write_kvm_clock` has told stays true.
        let ns = ns_of(ticks);
        self.start.tsc = self.start.tsc.wrapping_add(ticks);
        self.start.ns = self.start.ns.saturating_add(ns);
        let offset = self.cpu().tsc_offset.wrapping_sub(ticks);
        self.cpu_mut().tsc_offset = offset;
        self.chips.set_tsc_offset(self.index, offset as i64);
        self.chips.delay(self.index, ns as i64);
        self.look = true;
    }

    fn write_physical(&mut self, gpa: u64, bytes: &[u8]) {
        for (k, chunk) in bytes.chunks(4).enumerate() {
            let at = gpa.wrapping_add(4 * k as u64);
            if self.phys.slot(at).is_some() {
                // A piece of 4 bytes, aligned, stays inside a page. Without it the guest's clock
                // is wrong, which is its own doing where that is no RAM.
                let _ = self.special_write(at, chunk);
            }
        }
    }

    /// struct pvclock_vcpu_time_info: system time = ((tsc - stamp) << shift) * mul >> 32.
    fn write_kvm_clock(&mut self) {
        let msr = self.msrs.kvm_time;
        if msr & 1 == 0 {
            return;
        }
        let hz = clock::tsc_hz();
        let (mut shift, mut scaled) = (0i8, hz);
        while scaled > 2_000_000_000 {
            scaled >>= 1;
            shift -= 1;
        }
        while scaled <= 1_000_000_000 {
            scaled <<= 1;
            shift += 1;
        }
        // The counter is shifted first: rate after the shift is hz << shift.
        let rate = if shift < 0 { hz >> -shift } else { hz << shift };
        let mul = ((1_000_000_000u128 << 32) / u128::from(rate)).min(u128::from(u32::MAX)) as u32;
        // One moment for all processors: the guest may read any one's structure.
        let tsc = self.start.tsc.wrapping_add(self.cpu().tsc_offset);
        // Another engine may have written it before.
        // SAFETY: an aligned word of guest memory.
        let before = self.phys.host(msr & !3).map_or(0, |at| unsafe { (at as *const u32).read_volatile() });
        let version = (before | 1).wrapping_add(3);
        let mut b = [0u8; 32];
        b[8..16].copy_from_slice(&tsc.to_le_bytes());
        b[16..24].copy_from_slice(&self.start.system_ns.to_le_bytes());
        b[24..28].copy_from_slice(&mul.to_le_bytes());
        b[28] = shift as u8;
        // The counters of all processors agree.
        b[29] = 1;
        // Odd while the rest changes.
        let gpa = msr & !3;
        for (n, length) in [(version.wrapping_sub(1), 8), (version.wrapping_sub(1), 32), (version, 8)] {
            b[0..4].copy_from_slice(&n.to_le_bytes());
            self.write_physical(gpa, &b[..length]);
            fence(Ordering::SeqCst);
        }
    }

    /// struct pvclock_wall_clock: time of day at system time zero.
    fn write_wall_clock(&mut self, gpa: u64) {
        let clock = &self.chips.clock;
        let start = clock.wall_ns() - clock.now_ns().saturating_sub(self.start.ns) - self.start.system_ns;
        let mut b = [0u8; 16];
        b[0..4].copy_from_slice(&2u32.to_le_bytes());
        b[4..8].copy_from_slice(&((start / 1_000_000_000) as u32).to_le_bytes());
        b[8..12].copy_from_slice(&((start % 1_000_000_000) as u32).to_le_bytes());
        // Unlike the clock's, this structure is only aligned to its 32-bit members.
        self.write_physical(gpa & !3, &b[..12]);
    }
}
