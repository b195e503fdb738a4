//! KVM behind the engine boundary: the host's processor runs the guest, the host's
//! kernel has its interrupt controllers and timers.
//!
//! | file     | what                                                            |
//! |----------|-----------------------------------------------------------------|
//! | engine   | the virtual machine: memory, interrupt lines, doorbells          |
//! | vcpu     | a processor: running, exits and their answers, kicks             |
//! | state    | a processor's registers in and out                               |
//! | clocks   | its time-stamp counter and system time                           |
//! | chips    | IOAPIC, PIC and PIT in and out                                   |
//! | memory   | which part of guest memory is which slot; dirty pages; A20       |
//! | cpuid    | what KVM can offer a guest                                       |
//! | probe    | figures from a throwaway machine: what KVM here is worth         |
//!
//! Spec: Linux Documentation/virt/kvm/api.rst. `unsafe` stands in `vcpu`, `clocks`,
//! `memory`, `engine`, `chips` and `probe`, where the kernel is handed pointers or unions are read.
#![deny(missing_docs)]

mod chips;
mod clocks;
pub mod cpuid;
mod debug;
mod engine;
mod memory;
pub mod probe;
mod state;
mod vcpu;

pub use engine::KvmEngine;
pub use vcpu::{Failure, KvmVcpu};

use bunshin_core::EngineError;
use std::ffi::CString;

/// Another device node than [`NODE`], for containers that have it elsewhere.
const VARIABLE: &str = "BUNSHIN_KVM";
/// The device node.
pub const NODE: &str = "/dev/kvm";

/// An error of one of KVM's calls.
fn refused(what: impl std::fmt::Display, error: kvm_ioctls::Error) -> EngineError {
    let os = std::io::Error::from_raw_os_error(error.errno());
    EngineError::new("kvm", format!("KVM: {what}: {os}"))
}

/// Open the device node, and see that it speaks the version that there is.
fn open() -> Result<kvm_ioctls::Kvm, EngineError> {
    let path = std::env::var_os(VARIABLE).filter(|p| !p.is_empty()).unwrap_or_else(|| NODE.into());
    let node = std::path::Path::new(&path).display();
    let given = CString::new(path.as_encoded_bytes())
        .map_err(|_| EngineError::new("kvm", format!("{VARIABLE} has a NUL")))?;
    let kvm = kvm_ioctls::Kvm::new_with_path(given).map_err(|error| {
        let os = std::io::Error::from_raw_os_error(error.errno());
        let (slug, advice) = match os.kind() {
            std::io::ErrorKind::NotFound => {
                ("kvm-absent", "this host offers no hardware virtualization; the translator needs none")
            }
            std::io::ErrorKind::PermissionDenied => (
                "kvm-permission",
                "you may join the group that owns it (often \"kvm\"); the translator needs none",
            ),
            _ => ("kvm", "the translator needs none"),
        };
        EngineError::new(slug, format!("{node} cannot be opened: {os}; {advice}"))
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        other if other < 0 => Err(EngineError::new("kvm", format!("{node} is not KVM's"))),
        other => Err(EngineError::new("kvm", format!("{node} speaks version {other}, expected 12"))),
    }
}
