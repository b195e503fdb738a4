//! Guests with several processors, written in assembly: what they must be able to
//! rely on, however busy the host is. Where processors wait for each other the rounds
//! are few: on a busy host a wait may cost a time slice.
mod atomics;
mod code;
mod interrupts;
mod life;
mod machine;
mod order;
mod paging;
