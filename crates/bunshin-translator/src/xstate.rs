//! Vector state: registers as they lie in the processor page's XSAVE area, and the
//! instructions that save and restore it. SDM volume 1, chapter 13.
use crate::host;
use crate::host::components;
use crate::insn::decode;
use crate::interp::{Done, Flow};
use crate::mmu::{gp, ud, Kind};
use crate::vcpu::{mode, Vcpu};
use iced_x86::{Instruction, Mnemonic as M, Register};

/// XSAVE header offset of XSTATE_BV.
const XSTATE_BV: usize = 512;
const XCOMP_BV: usize = 520;

impl Vcpu {
    fn xstate_bv(&self) -> u64 {
        u64::from_le_bytes(self.cpu().xsave.0[XSTATE_BV..XSTATE_BV + 8].try_into().unwrap())
    }

    /// Write out the components that became initial. XSAVEOPT left their old
    /// bytes, and on Zen 4 may name them again later without writing them.
    pub fn blank_initial(&mut self) {
        let present = self.xstate_bv();
        let gone = std::mem::replace(&mut self.saved, present) & !present;
        for n in (0..8).filter(|n| gone >> n & 1 != 0) {
            let (at, length) = host::component(n);
            let x = &mut self.cpu_mut().xsave.0;
            x[at..at + length].fill(0);
            if n == 0 {
                x[..24].fill(0);
                x[..2].copy_from_slice(&0x37fu16.to_le_bytes());
            }
        }
    }

    /// Where a component lies, unless it is in its initial state.
    pub fn component(&self, n: usize) -> Option<usize> {
        (self.xstate_bv() >> n & 1 != 0).then(|| host::component(n).0)
    }

    /// Where a component lies; it is in use from now on.
    fn touch_component(&mut self, n: usize) -> usize {
        self.cpu_mut().xsave.0[XSTATE_BV] |= 1 << n;
        host::component(n).0
    }

    /// 64 bytes of vector register `n`.
    pub fn vector(&self, n: usize) -> [u8; 64] {
        let mut v = [0; 64];
        let x = &self.cpu().xsave.0;
        if n >= 16 {
            if let Some(at) = self.component(7) {
                v.copy_from_slice(&x[at + 64 * (n - 16)..][..64]);
            }
            return v;
        }
        if let Some(at) = self.component(1) {
            v[..16].copy_from_slice(&x[at + 16 * n..][..16]);
        }
        if let Some(at) = self.component(2) {
            v[16..32].copy_from_slice(&x[at + 16 * n..][..16]);
        }
        if host::xsave_mask() & 0x40 != 0 {
            if let Some(at) = self.component(6) {
                v[32..].copy_from_slice(&x[at + 32 * n..][..32]);
            }
        }
        v
    }

    pub fn set_vector(&mut self, n: usize, v: &[u8; 64]) {
        if n >= 16 {
            let at = self.touch_component(7);
            self.cpu_mut().xsave.0[at + 64 * (n - 16)..][..64].copy_from_slice(v);
            return;
        }
        let at = self.touch_component(1);
        self.cpu_mut().xsave.0[at + 16 * n..][..16].copy_from_slice(&v[..16]);
        let at = self.touch_component(2);
        self.cpu_mut().xsave.0[at + 16 * n..][..16].copy_from_slice(&v[16..32]);
        if host::xsave_mask() & 0x40 != 0 {
            let at = self.touch_component(6);
            self.cpu_mut().xsave.0[at + 32 * n..][..32].copy_from_slice(&v[32..]);
        }
    }

    pub fn opmask(&self, r: Register) -> u64 {
        let n = r as usize - Register::K0 as usize;
        let Some(at) = self.component(5) else { return 0 };
        u64::from_le_bytes(self.cpu().xsave.0[at + 8 * n..][..8].try_into().unwrap())
    }

    pub fn set_opmask(&mut self, r: Register, v: u64) {
        let n = r as usize - Register::K0 as usize;
        let at = self.touch_component(5);
        self.cpu_mut().xsave.0[at + 8 * n..][..8].copy_from_slice(&v.to_le_bytes());
    }
}

/// The registers that 16- and 32-bit code does not have: 8 to 31. What saves and
/// restores state there leaves them alone, and so the bytes that hold them.
pub struct Upper {
    registers: [[u8; 64]; 24],
}

impl Upper {
    /// As they are.
    pub fn new(v: &Vcpu) -> Self {
        Self { registers: std::array::from_fn(|n| v.vector(n + 8)) }
    }

    /// Put them back after a restore.
    pub fn keep_registers(&self, v: &mut Vcpu) {
        for (n, r) in self.registers.iter().enumerate() {
            if v.vector(n + 8) != *r {
                v.set_vector(n + 8, r);
            }
        }
    }

    /// Put back the bytes `old` of an image of components `m` where it has them.
    pub fn keep_memory(&self, m: u64, compact: bool, old: &[u8], image: &mut [u8]) {
        let mut keep = |from: usize, to: usize| image[from..to].copy_from_slice(&old[from..to]);
        if m & 2 != 0 {
            keep(288, 416);
        }
        let mut next = 576;
        for (n, c) in components().iter().enumerate().skip(2).filter(|(n, _)| m >> n & 1 != 0) {
            if compact && c.aligned {
                next = (next + 63) & !63;
            }
            let at = if compact { next } else { c.offset };
            next += c.size;
            match n {
                2 | 6 => keep(at + c.size / 2, at + c.size),
                7 => keep(at, at + c.size),
                _ => {}
            }
        }
    }
}

/// Bytes that an XSAVE or XRSTOR touches for the components in `m`.
fn xsave_bytes(m: u64, compact: bool) -> usize {
    let mut size = 576;
    for (n, c) in components().iter().enumerate().skip(2) {
        if m >> n & 1 == 0 {
            continue;
        }
        if compact {
            if c.aligned {
                size = (size + 63) & !63;
            }
            size += c.size;
        } else {
            size = size.max(c.offset + c.size);
        }
    }
    size
}

pub fn is_xsave(m: M) -> bool {
    matches!(
        m,
        M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaves
            | M::Xsaves64
    )
}

pub fn is_xrstor(m: M) -> bool {
    matches!(m, M::Xrstor | M::Xrstor64 | M::Xrstors | M::Xrstors64)
}

/// XSAVE and XRSTOR in all their forms, memory operand at `va`.
pub fn xsave(v: &mut Vcpu, i: &Instruction, bytes: &[u8], va: u64) -> Done {
    let m = i.mnemonic();
    let c = v.cpu();
    if c.cr4 & (1 << 18) == 0 {
        return Err(ud());
    }
    let supervisor = matches!(m, M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64);
    if supervisor && c.cpl != 0 || va & 63 != 0 {
        return Err(gp());
    }
    let rfbm = ((c.gpr[0] & 0xffff_ffff) | (c.gpr[2] << 32)) & c.xcr0;
    let (rax, rdx) = (c.gpr[0], c.gpr[2]);
    let who = v.data_access();
    // XSAVES and XRSTORS without supervisor components are XSAVEC and XRSTOR.
    let mut swapped = [0u8; 15];
    let n = bytes.len();
    swapped[..n].copy_from_slice(bytes);
    if supervisor {
        let at = bytes.windows(2).position(|w| w == [0x0f, 0xc7]).unwrap_or(0);
        if matches!(m, M::Xsaves | M::Xsaves64) {
            swapped[at + 2] = (bytes[at + 2] & !0x38) | 4 << 3;
        } else {
            swapped[at + 1] = 0xae;
            swapped[at + 2] = (bytes[at + 2] & !0x38) | 5 << 3;
        }
    }
    let insn = decode(&swapped[..n], mode::bits(v.mode()), i.ip());
    let compact_save = matches!(m, M::Xsavec | M::Xsavec64 | M::Xsaves | M::Xsaves64);
    // Processors look at the first byte and the last before the rest.
    let kind = if is_xsave(m) { Kind::Write } else { Kind::Read };
    v.check(va, 1, kind, who)?;
    let mut buffer = [0u8; 4096];
    let size = if is_xrstor(m) {
        v.read_as(va.wrapping_add(512), &mut buffer[512..576], who)?;
        let xcomp = u64::from_le_bytes(buffer[XCOMP_BV..XCOMP_BV + 8].try_into().unwrap());
        let xstate = u64::from_le_bytes(buffer[XSTATE_BV..XSTATE_BV + 8].try_into().unwrap());
        let compact = xcomp >> 63 != 0;
        let all = xcomp & !(1 << 63);
        let reserved = if compact { 528..576 } else { 520..536 };
        if supervisor && !compact
            || (xstate | all) & !v.cpu().xcr0 != 0
            || compact && xstate & !all != 0
            || buffer[reserved].iter().any(|&b| b != 0)
        {
            return Err(gp());
        }
        if compact {
            xsave_bytes(all, true)
        } else {
            xsave_bytes(rfbm, false)
        }
    } else {
        xsave_bytes(rfbm, compact_save)
    };
    v.check(va.wrapping_add(size as u64 - 1), 1, kind, who)?;
    v.check(va, size, kind, who)?;
    // Another processor may change the header: the one that was checked counts.
    let header: [u8; 64] = buffer[512..576].try_into().unwrap();
    v.read_as(va, &mut buffer[..size], who)?;
    if is_xrstor(m) {
        buffer[512..576].copy_from_slice(&header);
    }
    v.cpu_mut().bounce.0[..size].copy_from_slice(&buffer[..size]);
    v.cpu_mut().gpr[0] = rfbm & 0xffff_ffff;
    v.cpu_mut().gpr[2] = rfbm >> 32;
    let operand = v.cpu().bounce.0.as_ptr() as u64;
    let upper = (!v.cpu().code64()).then(|| Upper::new(v));
    let r = v.run_snippet(&swapped[..n], &insn, operand);
    v.cpu_mut().gpr[0] = rax;
    v.cpu_mut().gpr[2] = rdx;
    r?;
    if let Some(upper) = upper {
        if is_xsave(m) {
            upper.keep_memory(rfbm, compact_save, &buffer, &mut v.cpu_mut().bounce.0);
        } else {
            upper.keep_registers(v);
        }
    }
    if is_xsave(m) {
        buffer[..size].copy_from_slice(&v.cpu().bounce.0[..size]);
        if rfbm & 1 != 0 {
            buffer[6..24].fill(0);
        }
        v.write_as(va, &buffer[..size], who)?;
    }
    Ok(Flow::Next)
}
