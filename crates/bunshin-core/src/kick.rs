//! The signal that makes a thread look up from running a processor. All engines share
//! its number, so that a thread can run processors of several of them.
//!
//! An engine that has more to do in the handler than to interrupt the system call
//! installs its own before or after; [`install`] leaves that in place.
use std::sync::Once;

/// Its number.
pub fn signal() -> i32 {
    libc::SIGRTMIN() + 5
}

/// The calling thread, as [`send`] names it.
pub fn thread_id() -> u32 {
    thread_local! {
        static ID: u32 = {
            // SAFETY: no arguments.
            unsafe { libc::gettid() as u32 }
        };
    }
    ID.with(|i| *i)
}

/// Send the signal to a thread of this process; one that has gone does not mind.
pub fn send(thread: u32) {
    // SAFETY: a signal with a handler, see `install`; a thread that has gone gives ESRCH.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread as i32, signal()) };
}

extern "C" fn nothing(_signal: i32) {}

/// See to it that the signal has a handler, so that it does not end the process. Once
/// for the process.
pub fn install() {
    static DONE: Once = Once::new();
    DONE.call_once(|| {
        // SAFETY: reads and replaces the disposition of one signal; the handler does nothing.
        unsafe {
            let mut now: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal(), std::ptr::null(), &mut now);
            if now.sa_sigaction == libc::SIG_DFL {
                now.sa_sigaction = nothing as *const () as usize;
                now.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
                libc::sigaction(signal(), &now, std::ptr::null_mut());
            }
        }
    });
}
