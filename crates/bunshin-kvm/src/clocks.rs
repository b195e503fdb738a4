//! A guest's time: the time-stamp counter by its exact offset from the host's, and the
//! system time that kvmclock tells.
use crate::refused;
use bunshin_core::{clock, Result, Times};
use kvm_bindings::{
    kvm_clock_data, kvm_device_attr, kvm_msr_entry, Msrs, KVM_CLOCK_HOST_TSC, KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
};
use kvm_ioctls::{VcpuFd, VmFd};
use std::os::fd::AsRawFd;

const MSR_TSC: u32 = 0x10;
/// KVM_SET_DEVICE_ATTR and KVM_GET_DEVICE_ATTR: `_IOW(0xAE, 0xE1 or 0xE2, 24 bytes)`.
const SET_ATTRIBUTE: libc::c_ulong = 0x4018_AEE1;
const GET_ATTRIBUTE: libc::c_ulong = 0x4018_AEE2;

/// Nanoseconds that the host's counter takes for `ticks`.
pub fn ns_of(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000_000 / u128::from(clock::tsc_hz())) as u64
}

fn offset_attribute(fd: &VcpuFd, request: libc::c_ulong, offset: &mut u64) -> bool {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(offset) as u64,
        ..Default::default()
    };
    // SAFETY: the kernel reads the attribute, and reads or writes 8 bytes at its address.
    unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const attribute) == 0 }
}

/// The guest's counter less the host's.
pub fn tsc_offset(fd: &VcpuFd) -> Result<u64> {
    let mut offset = 0;
    if offset_attribute(fd, GET_ATTRIBUTE, &mut offset) {
        return Ok(offset);
    }
    // Kernels before 5.16: as near as two looks at the clock come.
    let mut msrs = msr(MSR_TSC, 0);
    let before = clock::rdtsc();
    fd.get_msrs(&mut msrs).map_err(|e| refused("reading the time-stamp counter", e))?;
    let host = before + (clock::rdtsc() - before) / 2;
    Ok(msrs.as_slice()[0].data.wrapping_sub(host))
}

/// Set the guest's counter to the host's plus `offset`.
pub fn set_tsc_offset(fd: &VcpuFd, offset: u64) -> Result<()> {
    let mut value = offset;
    if offset_attribute(fd, SET_ATTRIBUTE, &mut value) {
        return Ok(());
    }
    let msrs = msr(MSR_TSC, clock::rdtsc().wrapping_add(offset));
    fd.set_msrs(&msrs).map(drop).map_err(|e| refused("setting the time-stamp counter", e))
}

/// One model-specific register as KVM takes a list of them.
pub fn msr(index: u32, data: u64) -> Msrs {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    // One entry is below the limit of the list, the only thing that can be wrong.
    Msrs::from_entries(&[entry]).unwrap_or_else(|_| unreachable!("one entry fits"))
}

/// The guest's clocks.
pub fn times(vm: &VmFd, fd: &VcpuFd) -> Result<Times> {
    let before = clock::rdtsc();
    let data = vm.get_clock().map_err(|e| refused("reading the clock", e))?;
    let at = if data.flags & KVM_CLOCK_HOST_TSC != 0 {
        data.host_tsc
    } else {
        before + (clock::rdtsc() - before) / 2
    };
    Ok(Times { tsc_offset: tsc_offset(fd)?, system_ns: data.clock, at })
}

/// Let the guest's system time go on.
pub fn set_system_time(vm: &VmFd, times: &Times) -> Result<()> {
    let ago = ns_of(clock::rdtsc().saturating_sub(times.at));
    let data = kvm_clock_data { clock: times.system_ns.saturating_add(ago), ..Default::default() };
    vm.set_clock(&data).map_err(|e| refused("setting the clock", e))
}
