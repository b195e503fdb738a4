//! Going on after an exit: the shortest way from the owner's answer back into
//! translated code.
//!
//! An access to a device leaves translated code, and mostly the engine. Where it
//! left is remembered as [`Left`], so that neither the instruction nor the code
//! behind it is looked up again: that is most of what an exit would cost. Whatever
//! may have moved in between (events, dropped translations, a new state) makes the
//! loop look at rip afresh, which is always right.
use crate::block::Key;
use crate::insn::decode;
use crate::interp::Helper;
use crate::vcpu::{mode, Vcpu};
use bunshin_core::Exit;
use iced_x86::{Code, Instruction};
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

/// `Continue`: `cpu.resume` is set; `Break`: look at rip afresh, or leave with an exit.
pub type Way = ControlFlow<Option<Exit>>;

const LOOK: Way = ControlFlow::Break(None);

/// Code behind an instruction that left translated code.
#[derive(Clone, Copy)]
pub enum Behind {
    /// A host address inside the same translation.
    Code(u64),
    /// A translation of its own, if there is one.
    Block(Key),
    Unknown,
}

/// Where the last exit left translated code.
pub struct Left {
    /// The instruction waits for the owner's answer; None: it is done.
    waits: Option<(Instruction, Helper)>,
    behind: Behind,
    /// `Vcpu::drops` at that time.
    drops: (u64, u64),
}

/// A place in translated code whose access the table could not serve. Good as long as
/// its block lives.
#[derive(Clone)]
pub struct SlowSite {
    block: u32,
    insn: Instruction,
    behind: Behind,
}

/// Most places that are remembered.
const SITES: usize = 1024;

impl Vcpu {
    /// Changes with every translation that is dropped.
    fn drops(&self) -> (u64, u64) {
        (self.counters.killed, self.counters.cache_flushes)
    }

    /// After an exit: finish the instruction that has its answer now, and find the
    /// code behind it.
    pub fn go_on(&mut self, answered: bool) -> Way {
        match self.left.take() {
            Some(Left { waits: Some((insn, helper)), behind, drops }) if answered => {
                // Other processors may have had translations dropped meanwhile.
                let behind = if drops == self.drops() { behind } else { Behind::Unknown };
                self.outside(&insn, helper, behind)
            }
            _ if answered => ControlFlow::Break(self.step()),
            Some(Left { waits: None, behind, drops }) if drops == self.drops() => self.behind(behind),
            _ => LOOK,
        }
    }

    /// Perform an instruction outside translated code, which goes on `behind` it.
    pub fn outside(&mut self, insn: &Instruction, helper: Helper, behind: Behind) -> Way {
        let drops = self.drops();
        match self.perform(insn, helper) {
            Ok(true) => {
                // The instruction may have written over what follows it, or its
                // snippet may have found the cache full.
                let same = drops == self.drops();
                if let Some(exit) = self.outbox.pop_front() {
                    self.left = same.then_some(Left { waits: None, behind, drops });
                    return ControlFlow::Break(Some(exit));
                }
                if !same || self.eventful() {
                    return LOOK;
                }
                self.behind(behind)
            }
            Ok(false) => ControlFlow::Break(self.outbox.pop_front()),
            Err(exit) => {
                self.left = Some(Left { waits: Some((*insn, helper)), behind, drops });
                ControlFlow::Break(Some(exit))
            }
        }
    }

    /// Make `cpu.resume` the code behind the instruction that was performed.
    fn behind(&mut self, behind: Behind) -> Way {
        let code = match behind {
            Behind::Code(code) => Some(code),
            // Who counts looks at every block.
            Behind::Block(_) if self.counting() => None,
            Behind::Block(key) => {
                let found = self.blocks.index.get(&key).map(|&id| &self.blocks.all[id as usize]);
                found.filter(|b| b.second.is_none()).map(|b| b.body)
            }
            Behind::Unknown => None,
        };
        match code {
            Some(code) => {
                self.cpu_mut().resume = code;
                ControlFlow::Continue(())
            }
            None => LOOK,
        }
    }

    /// Translated code left at `cpu.host_pc` with an access that the table cannot
    /// serve: perform that instruction alone. The translation that left vouches for
    /// its bytes and their address, so no page walk is needed.
    pub fn slow_exit(&mut self) -> Way {
        let pc = self.cpu().host_pc;
        let known = self.slow_sites.get(&pc).filter(|s| !self.blocks.all[s.block as usize].dead).cloned();
        let site = match known {
            Some(site) => site,
            None => match self.slow_site(pc) {
                Ok(site) => site,
                Err(way) => return way,
            },
        };
        self.cpu_mut().rip = site.insn.ip();
        if self.cpu().pending.load(Ordering::Relaxed) != 0 && self.cpu().shadow == 0 {
            self.not_begun();
            return LOOK;
        }
        self.counters.slow_steps += 1;
        self.outside(&site.insn, Helper { run: crate::slow::any, outside: true }, site.behind)
    }

    /// Find out about a new place.
    fn slow_site(&mut self, pc: u64) -> Result<SlowSite, Way> {
        // A return address lies behind its call.
        let Some((b, p)) = self.blocks.locate(pc - 1) else {
            self.fail(format!("host address {pc:#x} is in no translation"));
            return Err(LOOK);
        };
        let mut key = b.key;
        // What has been dropped already may have other bytes now.
        let block = self.blocks.index.get(&b.key).copied().filter(|_| !b.dead);
        key.va = key.va.wrapping_add(p.guest as u64);
        key.gpa = key.gpa.wrapping_add(p.guest as u64);
        let whole = b.second.is_none();
        self.cpu_mut().rip = key.va;
        let Some(insn) = whole.then(|| self.decode_at(key.gpa, key.va)).flatten() else {
            let stopped = self.cpu().pending.load(Ordering::Relaxed) != 0 && self.cpu().shadow == 0;
            if stopped {
                self.not_begun();
                return Err(LOOK);
            }
            return Err(ControlFlow::Break(self.step()));
        };
        let length = insn.len() as u64;
        let behind = if (key.gpa & 0xfff) + length < 4096 {
            key.va = insn.next_ip();
            key.gpa += length;
            key.mode &= !mode::ALONE;
            Behind::Block(key)
        } else {
            Behind::Unknown
        };
        let site = SlowSite { block: block.unwrap_or(0), insn, behind };
        if block.is_some() {
            if self.slow_sites.len() >= SITES {
                self.slow_sites.clear();
            }
            self.slow_sites.insert(pc, site.clone());
        }
        Ok(site)
    }

    /// Decode the instruction at `gpa`, unless it may run into the next page.
    fn decode_at(&mut self, gpa: u64, rip: u64) -> Option<Instruction> {
        let host = self.phys.host(gpa)?;
        let length = (4096 - (gpa & 0xfff)).min(15) as usize;
        let mut bytes = [0u8; 15];
        // SAFETY: bytes of one page of guest RAM.
        unsafe { std::ptr::copy_nonoverlapping(host as *const u8, bytes.as_mut_ptr(), length) };
        let insn = decode(&bytes[..length], mode::bits(self.mode()), rip);
        (insn.code() != Code::INVALID).then_some(insn)
    }
}
