//! One slot: an instruction that is privileged, changes the mode or depends on
//! it, with what it needs in registers and on the stack.
use super::super::layout::*;
use super::{Draft, Mode, CONFORMING, CONFORMING32, CS32, GATE};

/// MSRs that both machines have and that nothing else depends on.
pub const MSRS: [u32; 11] = [
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
    0x174,
    0x175,
    0x176,
];

const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;

impl Draft<'_> {
    pub(super) fn instruction(&mut self) {
        if self.case.slots.len() + 1 == self.lstar && self.mode.bits == 64 && self.random.one_in(2) {
            self.case.privileged += 1;
            return self.enter_supervisor();
        }
        let wide = self.mode.bits == 64;
        let kind = self.random.below(40);
        self.case.privileged += u32::from(kind <= 31);
        match kind {
            0..=3 if wide || self.mode.ring == 3 => self.control_register(),
            4 => self.machine_status(),
            5..=8 => self.selector(),
            9 | 10 if wide => self.sysret(),
            11..=13 => self.iret(),
            14 | 15 => self.far(),
            16 | 17 => self.interrupt(),
            18 | 19 => self.msr(),
            20 | 21 if wide => self.base(),
            22..=24 => self.flag(),
            25 | 26 if wide => self.page_table(),
            27 => self.invalidate(),
            28 => self.extended_control(),
            29 => self.port(),
            30 => self.table_register(),
            31 if self.random.one_in(2) => self.debug_register(),
            31 => self.rare(),
            _ => self.access(),
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// MOV of a constant to one of the first eight registers.
    fn load(&mut self, register: u8, value: u64) {
        if self.mode.bits == 64 && value > 0xffff_ffff {
            self.put(&[0x48, 0xb8 | register]);
            self.put(&value.to_le_bytes());
        } else {
            self.put(&[0xb8 | register]);
            self.put(&(value as u32).to_le_bytes());
        }
    }

    fn push_constant(&mut self, value: u64) {
        if value < 0x80 {
            self.put(&[0x6a, value as u8]);
        } else {
            self.put(&[0x68]);
            self.put(&(value as u32).to_le_bytes());
        }
    }

    /// The ModRM byte, SIB byte and displacement of an absolute address, the same for 32-
    /// and 64-bit code: the shorter form of the former would be relative in the latter.
    fn absolute(&mut self, reg: u8, address: u64) {
        self.put(&[0x04 | reg << 3, 0x25]);
        self.put(&(address as u32).to_le_bytes());
    }

    fn wide_prefix(&mut self) {
        if self.mode.bits == 64 {
            self.put(&[0x48]);
        }
    }

    fn cr4(&mut self) -> u64 {
        let mut value = self.case.get("cr4");
        for _ in 0..1 + self.random.below(2) {
            // Not PCIDE: CR3 must fit, and QEMU does not look.
            value ^= 1 << self.random.pick(&[2, 3, 7, 8, 11, 16, 20, 21, 18, 20, 21]);
        }
        // Without PAE, or with reserved bits, it must fault; QEMU resets.
        value
    }

    fn cr3(&mut self) -> u64 {
        let root = self.random.below(2);
        let value = TABLES[root as usize] | (root + 1);
        // Bits 52 and 63: QEMU looks at neither of them as processors do.
        match self.random.below(16) {
            0 | 1 => value & !0xfff,
            2 => value | 0x18,
            _ => value,
        }
    }

    fn control_register(&mut self) {
        let (number, value) = match self.random.below(9) {
            0 | 1 => {
                // What must fault does not in QEMU: no PE, no PG, NW alone, upper bits.
                let value = CR0 ^ self.random.pick(&[0, 1 << 16, 1 << 16, 2, 1 << 16 | 2]);
                (0, value)
            }
            2..=4 => (4, self.cr4()),
            5 | 6 => (3, self.cr3()),
            7 => (8, self.random.below(16)),
            _ => (2, self.pointer()),
        };
        if self.random.one_in(4) {
            // A read.
            let number = self.random.pick(&[0, 2, 3, 4]);
            self.put(&[0x0f, 0x20, 0xc0 | number << 3]);
            return;
        }
        if number == 8 {
            // As 32-bit code this were a MOV to CR0 that ends long mode and the case's
            // harmlessness with it; the upper half of the constant faults there first.
            self.put(&[0x48, 0xb8]);
            self.put(&value.to_le_bytes());
            self.put(&[0x44]);
        } else {
            self.load(RAX, value);
        }
        self.put(&[0x0f, 0x22, 0xc0 | (number & 7) << 3]);
    }

    /// CLTS, LMSW, SMSW.
    fn machine_status(&mut self) {
        match self.random.below(4) {
            0 => self.put(&[0x0f, 0x06]),
            1 => {
                let value = self.random.pick(&[0, 1, 2, 3]);
                self.load(RAX, value);
                self.put(&[0x0f, 0x01, 0xf0]);
            }
            2 => self.put(&[0x0f, 0x01, 0xe0]),
            _ => {
                let address = self.pointer();
                self.put(&[0x0f, 0x01]);
                self.absolute(4, address);
            }
        }
    }

    /// A selector, mostly of something.
    fn any_selector(&mut self) -> u64 {
        match self.random.below(12) {
            0 => self.random.below(4),
            1 => self.random.below(0x1_0000),
            2 => self.random.pick(&[KERNEL_CS, KERNEL_SS, USER_CS32, USER_SS, USER_CS]),
            3 => self.random.pick(&[TR, LDTR, TR_OTHER]) | self.random.below(4),
            4..=6 => (8 * self.random.below(8)) | 4 | self.random.below(4),
            _ => (8 * self.random.below(32)) | self.random.below(4),
        }
    }

    fn selector(&mut self) {
        let selector = self.any_selector();
        let noise = self.random.next() & 0xffff_0000;
        match self.random.below(12) {
            0..=3 => {
                let segment = self.random.pick(&[0, 2, 3, 4, 5, 4, 5, 1]);
                // QEMU does not look at the level of a null SS, and keeps that of
                // others where processors do not.
                let selector = match (selector < 4, segment) {
                    (true, 2) => self.mode.ring,
                    (true, _) => 0,
                    _ => selector,
                };
                self.load(RAX, selector | noise);
                self.put(&[0x8e, 0xc0 | segment << 3]);
            }
            4..=7 => {
                self.load(RAX, selector | noise);
                // LAR of 16 bits: the limit's bits in the wide form differ by vendor.
                let way: &[u8] = self.random.pick(&[
                    &[0x66, 0x0f, 0x02, 0xc8][..],
                    &[0x0f, 0x03, 0xc8],
                    &[0x0f, 0, 0xe0],
                    &[0x0f, 0, 0xe8],
                ]);
                self.put(way);
            }
            8 => {
                let segment = self.random.below(6) as u8;
                self.put(&[0x8c, 0xc0 | segment << 3]);
            }
            9 => {
                let register = self.random.pick(&[0xc0, 0xc8]);
                self.put(&[0x0f, 0x00, register]);
            }
            10 => {
                // QEMU loads a null TR and dies of it.
                let selector = if selector < 4 { TR_OTHER } else { selector };
                self.load(RAX, selector | noise);
                let register = self.random.pick(&[0xd0, 0xd8]);
                self.put(&[0x0f, 0x00, register]);
            }
            _ => {
                let selector = if selector < 4 { 0 } else { selector };
                let pop = self.random.pick(&[0xa1, 0xa9]);
                self.push_constant(selector);
                self.put(&[0x0f, pop]);
            }
        }
    }

    /// SYSCALL or a call gate, to the slot that LSTAR names.
    fn enter_supervisor(&mut self) {
        if self.random.one_in(2) {
            self.push_constant(0);
            self.put(&[0xc7, 0x44, 0x24, 0x04]);
            self.put(&(GATE as u32 | 3).to_le_bytes());
            self.put(&[0xff, 0x1c, 0x24]);
        } else {
            self.put(&[0x0f, 0x05]);
        }
        self.mode = Mode { ring: 0, bits: 64 };
    }

    fn sysret(&mut self) {
        let flags = self.flags();
        let wide = self.random.percent(70);
        let target = match self.random.below(16) {
            0 => 1 << 47,
            _ => self.next(3),
        };
        // r11 first: the prefix is INC ECX in 32-bit code.
        self.put(&[0x41, 0xbb]);
        self.put(&(flags as u32).to_le_bytes());
        self.load(RCX, target);
        if wide {
            self.put(&[0x48]);
        }
        self.put(&[0x0f, 0x07]);
        if self.mode.ring == 0 {
            self.mode = Mode { ring: 3, bits: if wide { 64 } else { 32 } };
        }
    }

    /// Code to go to: selector, and the mode it means.
    fn code_selector(&mut self) -> (u64, Mode) {
        let mode = |ring, bits| Mode { ring, bits };
        let ring = self.mode.ring;
        match self.random.below(12) {
            0..=2 if ring == 0 => (KERNEL_CS, mode(0, 64)),
            3 if ring == 0 => (CS32, mode(0, 32)),
            4 => (CONFORMING | ring, mode(ring, 64)),
            5 => (CONFORMING32 | ring, mode(ring, 32)),
            6 | 7 => (USER_CS32, mode(3, 32)),
            8 => (self.any_selector(), self.mode),
            _ => (USER_CS, mode(3, 64)),
        }
    }

    fn stack(&mut self, ring: u64) -> (u64, u64) {
        let rsp = if ring == 3 { STACK3 } else { STACK0 } + self.random.pick(&[0x800, 0x7f0, 0x808]);
        let ss = match (ring, self.random.below(12)) {
            (_, 0) => self.any_selector(),
            (3, _) => USER_SS,
            (1 | 2, _) => self.any_selector() & !3 | ring,
            _ => KERNEL_SS,
        };
        // A null stack segment is for 64-bit code alone.
        (if ss < 4 && self.mode.bits != 64 { KERNEL_SS } else { ss }, rsp)
    }

    fn iret(&mut self) {
        let (cs, mode) = self.code_selector();
        let outer = cs & 3 != self.mode.ring;
        let (ss, rsp) = self.stack(cs & 3);
        let flags = self.flags();
        if self.mode.bits == 64 || outer {
            // A null one is for 64-bit code alone; QEMU does not look.
            let ss = if ss < 4 && ![KERNEL_CS, CONFORMING].contains(&cs) { KERNEL_SS } else { ss };
            self.push_constant(ss);
            self.push_constant(rsp);
        }
        self.push_constant(flags);
        self.push_constant(cs);
        let next = self.next(mode.ring);
        self.push_constant(next);
        self.wide_prefix();
        self.put(&[0xcf]);
        self.mode = mode;
    }

    fn far(&mut self) {
        let (cs, mode) = self.code_selector();
        let outer = cs & 3 != self.mode.ring;
        let next = self.next(mode.ring);
        match self.random.below(3) {
            0 if !outer => {
                let call = self.random.one_in(2);
                if self.mode.bits == 64 {
                    self.push_constant(next);
                    self.put(&[0xc7, 0x44, 0x24, 0x04]);
                    self.put(&(cs as u32).to_le_bytes());
                    self.put(&[0xff, if call { 0x1c } else { 0x2c }, 0x24]);
                } else {
                    self.put(&[if call { 0x9a } else { 0xea }]);
                    self.put(&(next as u32).to_le_bytes());
                    self.put(&(cs as u16).to_le_bytes());
                }
            }
            _ => {
                if outer {
                    let (ss, rsp) = self.stack(cs & 3);
                    let ss = if ss < 4 { KERNEL_SS } else { ss };
                    self.push_constant(ss);
                    self.push_constant(rsp);
                }
                self.push_constant(cs);
                self.push_constant(next);
                self.wide_prefix();
                self.put(&[0xcb]);
            }
        }
        self.mode = mode;
    }

    fn interrupt(&mut self) {
        match self.random.below(6) {
            0 => self.put(&[0xcc]),
            1 => {
                // INT pushes no error code, which the handlers of these expect.
                let number = match self.random.below(0x100) as u8 {
                    n @ (8 | 10..=14 | 17) => n + 0x20,
                    n => n,
                };
                self.put(&[0xcd, number]);
            }
            2 if self.mode.bits == 32 => self.put(&[0xce]),
            3 => self.put(&[0x0f, 0x0b]),
            _ => {
                let number = 0x20 + self.random.below(16) as u8;
                self.put(&[0xcd, number]);
            }
        }
    }

    fn msr(&mut self) {
        let (msr, value) = if self.random.one_in(4) {
            // EFER: SCE. LME and reserved bits must fault, QEMU takes them; what
            // the TLB keeps of pages when NXE changes is not defined.
            let value = (EFER | 1 << 10) ^ 1;
            (0xc000_0080, value)
        } else {
            let msr = self.random.pick(&MSRS);
            let value = match self.random.below(4) {
                0 => self.random.integer(),
                1 => HALF | self.random.below(1 << 40),
                _ => self.random.next() >> 20,
            };
            // The upper halves of STAR's selectors do, the lower as they fall.
            let value = match msr {
                0xc000_0081 => self.case.get("star") ^ value & 0xffff_ffff,
                0x174 => value & 0xffff,
                // QEMU takes addresses that are not canonical.
                0x175 | 0x176 | 0xc000_0082 | 0xc000_0083 | 0xc000_0100..=0xc000_0102 => {
                    ((value << 16) as i64 >> 16) as u64
                }
                0xc000_0103 => value & 0xffff_ffff,
                0xc000_0084 => value & 0xffff_ffff | 0xcd5,
                _ => value,
            };
            (msr, value)
        };
        self.load(RCX, u64::from(msr));
        if self.random.one_in(3) {
            self.put(&[0x0f, 0x32]);
            return;
        }
        self.load(RAX, value & 0xffff_ffff);
        self.load(RDX, value >> 32);
        self.put(&[0x0f, 0x30]);
    }

    /// SWAPGS, RDFSBASE, WRGSBASE and accesses through both.
    fn base(&mut self) {
        match self.random.below(4) {
            0 | 1 => self.put(&[0x0f, 0x01, 0xf8]),
            2 => {
                let which = self.random.below(4) as u8;
                let wide = self.random.one_in(2);
                // QEMU takes addresses that are not canonical.
                let value = if self.random.one_in(6) { self.random.integer() } else { self.pointer() };
                let value = ((value << 16) as i64 >> 16) as u64;
                self.load(RAX, value);
                self.put(if wide { &[0xf3, 0x48, 0x0f, 0xae] } else { &[0xf3, 0x0f, 0xae] });
                self.put(&[0xc0 | which << 3]);
            }
            _ => {
                let prefix = self.random.pick(&[0x64, 0x65]);
                let at = self.random.below(0x60);
                self.put(&[prefix, 0x8b]);
                self.absolute(0, at);
            }
        }
    }

    fn flag(&mut self) {
        match self.random.below(8) {
            0 => self.put(&[0xfa]),
            1 => self.put(&[0xfb]),
            2 => self.put(&[0x0f, 0x01, 0xca]),
            3 => self.put(&[0x0f, 0x01, 0xcb]),
            4 => {
                self.put(&[0x9c, 0x58]);
            }
            5 => {
                let flags = self.flags();
                self.push_constant(flags);
                self.put(&[0x66, 0x9d]);
            }
            _ => {
                let flags = self.flags();
                self.push_constant(flags);
                self.put(&[0x9d]);
            }
        }
    }

    /// Change an entry of the page table that maps the window, and let the
    /// TLB know.
    fn page_table(&mut self) {
        let number = self.random.pick(&[2, 3, 4, 5, 9, 10, 11, 12, 13, 14, 15]);
        let entry = self.entry();
        self.load(RAX, entry);
        self.put(&[0x48, 0x89]);
        self.absolute(0, TABLE + 8 * number);
        self.put(&[0x0f, 0x01]);
        self.absolute(7, WINDOW + 0x1000 * number);
    }

    fn invalidate(&mut self) {
        if !self.choice.invpcid || self.random.one_in(2) {
            let address = self.pointer();
            self.put(&[0x0f, 0x01]);
            self.absolute(7, address);
        } else {
            let kind = self.random.below(5);
            let address = self.pointer() & 0x7fff_ffff;
            let pcid = self.random.pick(&[0, 1, 2, 2, 0x1000]);
            self.push_constant(address);
            self.push_constant(pcid);
            self.load(RAX, kind);
            self.put(&[0x66, 0x0f, 0x38, 0x82, 0x04, 0x24]);
        }
    }

    fn extended_control(&mut self) {
        self.put(&[0x31, 0xc9]);
        if self.random.one_in(3) {
            self.put(&[0x0f, 0x01, 0xd0]);
            return;
        }
        let value = self.random.pick(&[7, 3, 1, 0, 2, 5, 6, 1 << 9, 1 << 62]);
        self.load(RAX, value & 0xffff_ffff);
        self.load(RDX, value >> 32);
        self.put(&[0x0f, 0x01, 0xd1]);
    }

    /// Ports where neither machine has a device.
    fn port(&mut self) {
        let port = 0x210 + self.random.below(0xb0);
        self.load(RDX, port);
        let way = self.random.pick(&[
            &[0xec][..],
            &[0xed],
            &[0x66, 0xed],
            &[0xee],
            &[0xef],
            &[0x66, 0xef],
            &[0x6e],
            &[0x6f],
        ]);
        self.put(way);
        // What comes from nowhere is the machine's to say.
        self.load(RAX, port);
    }

    /// LGDT, LIDT of what is there, SGDT, SIDT, SLDT, STR.
    fn table_register(&mut self) {
        if self.mode.bits == 64 && self.random.one_in(2) {
            let (number, reg) = self.random.pick(&[(0, 2), (1, 2), (2, 3), (3, 3)]);
            self.load(RAX, HALF + OPERANDS + 16 * number);
            self.put(&[0x0f, 0x01, reg << 3]);
        } else {
            // In one page: of what lies in two, how much is written is not defined.
            let page = self.random.pick(&[2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15]);
            let address = WINDOW + 0x1000 * page + self.random.below(0x70);
            let (opcode, reg) = self.random.pick(&[(1, 0), (1, 1), (0, 0), (0, 1)]);
            self.put(&[0x0f, opcode]);
            self.absolute(reg, address);
        }
    }

    /// MOV to and from debug registers.
    fn debug_register(&mut self) {
        let (number, value) = match self.random.below(8) {
            0..=2 => {
                let number = self.random.below(4) as u8;
                (number, self.breakpoint(number.into()))
            }
            3 | 4 => (self.random.pick(&[7, 7, 7, 5]), self.dr7()),
            // QEMU lets bit 12 be set.
            5 => (self.random.pick(&[6, 4]), self.random.below(0x1_0000) & !0x1000),
            _ => {
                let number = self.random.below(8) as u8;
                self.put(&[0x0f, 0x21, 0xc0 | number << 3]);
                return;
            }
        };
        self.load(RAX, value);
        self.put(&[0x0f, 0x23, 0xc0 | number << 3]);
    }

    fn rare(&mut self) {
        match self.random.below(5) {
            0 => {
                self.put(&[0x0f, 0x31]);
                self.load(RAX, 0x55);
                self.load(RDX, 0xaa);
            }
            1 => self.put(&[0x0f, 0x09]),
            2 => self.put(&[0x0f, 0x34]),
            3 => self.put(&[0x0f, 0x35]),
            _ => self.put(&[0x66, 0x90]),
        }
    }

    /// Loads, stores, stack and string instructions, arithmetic.
    fn access(&mut self) {
        let address = self.pointer();
        let reg = self.random.pick(&[0, 1, 2, 3, 5, 6, 7]);
        match self.random.below(12) {
            0..=6 => {
                let way: &[u8] = self.random.pick(&[
                    &[0x8b][..],
                    &[0x8b],
                    &[0x89],
                    &[0x89],
                    &[0x01],
                    &[0x13],
                    &[0x88],
                    &[0x8a],
                    &[0x66, 0x89],
                    &[0xf0, 0x0f, 0xc1],
                    &[0x0f, 0xb1],
                    &[0x87],
                ]);
                self.put(way);
                self.absolute(reg, address);
            }
            7 => {
                let (opcode, reg) = self.random.pick(&[(0xff, 6), (0x8f, 0), (0xff, 0), (0xf7, 2)]);
                self.put(&[opcode]);
                self.absolute(reg, address);
            }
            8 | 9 => {
                let other = self.pointer();
                self.load(7, address & 0xffff_ffff);
                self.load(6, other & 0xffff_ffff);
                let count = self.random.below(12);
                self.load(RCX, count);
                let way =
                    self.random.pick(&[[0xf3, 0xa4], [0xf3, 0xab], [0xf3, 0xa5], [0xf2, 0xae], [0xf3, 0xa6]]);
                self.put(&way);
            }
            10 => {
                let way: &[u8] = self.random.pick(&[
                    &[0x01, 0xd8][..],
                    &[0x11, 0xd1],
                    &[0x29, 0xc2],
                    &[0x19, 0xc8],
                    &[0x39, 0xc3],
                    &[0x85, 0xc9],
                    // It must fault, even where SYSRET ended up a byte further: what it
                    // leaves in the flags is not defined.
                    &[0x90, 0x31, 0xc9, 0xf7, 0xf1],
                ]);
                self.put(way);
            }
            _ => {
                let last = if self.random.one_in(4) { 0xc9 } else { 0x53 };
                let way = self.random.pick(&[0x50, 0x59, last, 0x54]);
                self.put(&[way]);
            }
        }
    }
}
