//! The modes that stock 64-bit kernels never enter, a small guest for each rule.
//!
//! What a test expects is the manual's word (SDM volume 3); a comment names the place
//! where that is not obvious.
mod debugging;
mod gates;
mod machine;
mod owner;
mod paging;
mod real;
mod segments;
mod tasks;
mod units;
mod vm86;
