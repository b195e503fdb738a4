//! The boundary itself: [`Engine`], [`Vcpu`], [`Exit`], [`Reply`].
use crate::chips::ChipsState;
use crate::debug::{Debugging, Stop};
use crate::error::{EngineError, Result};
use crate::memory::Region;
use crate::state::{CpuState, Times};
use std::sync::Arc;

/// Why a virtual processor came back to its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// `IN`: the reply carries `size * count` bytes.
    PioIn {
        /// Port number.
        port: u16,
        /// 1, 2 or 4 bytes.
        size: u8,
        /// Elements; more than 1 for string input.
        count: u32,
    },
    /// `OUT`.
    PioOut {
        /// Port number.
        port: u16,
        /// 1, 2 or 4 bytes.
        size: u8,
        /// `size * count` bytes, little-endian elements.
        data: Vec<u8>,
    },
    /// A load outside RAM: the reply carries the value.
    MmioRead {
        /// Guest-physical address.
        gpa: u64,
        /// 1, 2, 4 or 8 bytes.
        size: u8,
    },
    /// A store outside RAM.
    MmioWrite {
        /// Guest-physical address.
        gpa: u64,
        /// 1, 2, 4 or 8 bytes.
        size: u8,
        /// The value, zero-extended.
        value: u64,
    },
    /// VMCALL or VMMCALL from supervisor mode; the reply is the new rax.
    Hypercall {
        /// Value of rax.
        number: u64,
    },
    /// What the owner asked for by [`Vcpu::set_debug`].
    Debug {
        /// What it was.
        stop: Stop,
    },
    /// Somebody called [`Kicker::kick`].
    Kicked,
    /// Triple fault.
    Shutdown {
        /// One sentence: which fault, where.
        reason: String,
    },
    /// The engine cannot go on; the guest is not to blame.
    Failed {
        /// One sentence.
        reason: String,
    },
}

/// The answer to the exit before.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Reply {
    /// The exit wanted no answer.
    #[default]
    None,
    /// Value for `PioIn` with count 1, `MmioRead`, `Hypercall`.
    Value(u64),
    /// Bytes for a string `PioIn`.
    Bytes(Vec<u8>),
}

/// Makes a running virtual processor come back with [`Exit::Kicked`]; may be
/// called from any thread at any time.
pub trait Kicker: Send + Sync {
    /// Ask once. A kick while the processor is not running makes the next run
    /// return at once.
    fn kick(&self);
}

/// One virtual processor. It stays on the thread that first ran it.
pub trait Vcpu: Send {
    /// Give the answer to the last exit and run until the next one. HLT waits
    /// inside.
    fn run(&mut self, reply: Reply) -> Exit;
    /// Give the answer to the last exit and finish its instruction, without running
    /// on. An exit that comes back belongs to the same instruction and wants its
    /// answer too; after None the state can be taken.
    fn complete(&mut self, reply: Reply) -> Option<Exit>;
    /// Copy the state out; the last exit must be complete.
    fn state(&mut self) -> CpuState;
    /// Replace the state. A `tsc` of 0, an empty `lapic` and model-specific registers
    /// that are not named leave what they stand for as it is.
    fn set_state(&mut self, state: &CpuState) -> Result<()>;
    /// From the next run on, stop for this, and no longer for what was asked before;
    /// the last exit must be complete.
    fn set_debug(&mut self, debugging: &Debugging) -> Result<()> {
        if *debugging == Debugging::default() {
            return Ok(());
        }
        Err(EngineError::new("debug", "this engine stops for no breakpoints"))
    }
    /// Instructions executed in runs with a `count`, ever.
    fn executed(&self) -> u64 {
        0
    }
    /// The clocks as they go on this host. What another processor of this host is given
    /// goes on where this one stands, to the tick.
    fn times(&mut self) -> Times;
    /// Replace the clocks.
    fn set_times(&mut self, times: &Times);
    /// Take `ticks` of the host's time-stamp counter out of the guest's time: its
    /// counter goes back by so many, and the guest's other clocks and timers that
    /// the engine keeps go with it. Done alike to all processors of a machine after
    /// a pause, it leaves the guest without a trace of the pause.
    fn skip_time(&mut self, ticks: u64);
    /// A handle that kicks this processor.
    fn kicker(&self) -> Arc<dyn Kicker>;
    /// Translate a guest-virtual address by the page tables in use, whatever its rights;
    /// None if unmapped. The guest does not notice: no accessed bit changes.
    fn translate(&mut self, gva: u64) -> Option<u64>;
    /// Counters by name.
    fn stats(&self) -> Vec<(&'static str, u64)>;
}

/// One machine's processors, memory map and interrupt controllers.
pub trait Engine: Send + Sync {
    /// `translator`, `kvm`.
    fn name(&self) -> &'static str;
    /// Take virtual processor `index`; each can be taken once.
    fn vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>>;
    /// Map part of a region at a guest-physical address.
    fn map(&self, gpa: u64, region: &Arc<Region>, offset: u64, length: u64, readonly: bool) -> Result<()>;
    /// Unmap a guest-physical range.
    fn unmap(&self, gpa: u64, length: u64) -> Result<()>;
    /// Copy out of guest-physical RAM; false when part of it is not RAM.
    fn read(&self, gpa: u64, into: &mut [u8]) -> bool;
    /// Copy into guest-physical RAM, dropping translations of changed code.
    fn write(&self, gpa: u64, from: &[u8]) -> bool;
    /// Drive an interrupt line of the chipset.
    fn set_irq(&self, gsi: u32, level: bool);
    /// Open or close the A20 gate. While it is closed, bit 20 of the physical
    /// addresses that processors use is forced to 0; it is open at the start. An
    /// answer to an exit that follows the call finds it in place.
    fn set_a20(&self, open: bool);
    /// Deliver a message-signalled interrupt.
    fn send_msi(&self, address: u64, data: u32);
    /// Writes of `value` (any value if None) of `size` bytes to `address`
    /// signal `event` (an eventfd) and do not stop the processor.
    fn doorbell(&self, address: u64, size: u8, value: Option<u64>, event: i32) -> Result<()>;
    /// Pages written since the last call: one bit a page, first page in bit 0.
    fn take_dirty(&self, gpa: u64, length: u64) -> Result<Vec<u8>>;
    /// Let the guest's clocks stand at `ns` nanoseconds from now on, for runs that can
    /// be repeated; None lets them run with the host's. Called first before a processor
    /// is taken.
    fn set_time(&self, ns: Option<u64>) -> Result<()> {
        let _ = ns;
        Err(EngineError::new("time", "this engine's time cannot be scripted"))
    }
    /// The interrupt controllers and the PIT, while all processors stand still. The
    /// local APICs are part of the processors' states and left out.
    fn chips(&self) -> Result<ChipsState>;
    /// Replace the interrupt controllers and the PIT, before the processors get their
    /// states. Levels come back without edges.
    fn set_chips(&self, chips: &ChipsState) -> Result<()>;
    /// Ticks of the guest's time-stamp counter in a second.
    fn tsc_hz(&self) -> u64;
    /// The host's time-stamp counter, which [`Vcpu::skip_time`] counts in.
    fn host_tsc(&self) -> u64;
}
