//! The memory that guest and host code share by address: code, data and stack
//! at fixed low addresses, the same natively and inside the guest, each
//! surrounded by pages that are not mapped.
//!
//! | segment | base        | pages | access |
//! |---------|-------------|-------|--------|
//! | code    | 0x1000_0000 | 4     | rwx    |
//! | data    | 0x2000_0000 | 8     | rw     |
//! | stack   | 0x3000_0000 | 4     | rw     |
//!
//! Between cases the memory holds one fixed image ([`base_image`]). A case
//! writes its patches over it; after the run the changed lines are collected
//! for comparison and the image is put back, so that a case costs a scan of
//! 64 KiB and not a copy.
use crate::random::Random;
use std::sync::OnceLock;

/// Bytes in a page.
pub const PAGE: u64 = 4096;
/// Base of the code segment.
pub const CODE: u64 = 0x1000_0000;
/// Base of the data segment.
pub const DATA: u64 = 0x2000_0000;
/// Base of the stack segment.
pub const STACK: u64 = 0x3000_0000;
/// Bytes of the code segment.
pub const CODE_LENGTH: u64 = 4 * PAGE;
/// Bytes of the data segment.
pub const DATA_LENGTH: u64 = 8 * PAGE;
/// Bytes of the stack segment.
pub const STACK_LENGTH: u64 = 4 * PAGE;
/// Bytes of all segments together.
pub const IMAGE_LENGTH: usize = (CODE_LENGTH + DATA_LENGTH + STACK_LENGTH) as usize;
/// Unit in which changed memory is reported.
pub const LINE: usize = 64;

/// One mapped range.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub length: u64,
    /// Offset in the image.
    pub offset: usize,
    /// Instructions may be fetched here.
    pub executable: bool,
}

/// The three segments in order of address and of image offset.
pub const SEGMENTS: [Segment; 3] = [
    Segment { base: CODE, length: CODE_LENGTH, offset: 0, executable: true },
    Segment { base: DATA, length: DATA_LENGTH, offset: CODE_LENGTH as usize, executable: false },
    Segment {
        base: STACK,
        length: STACK_LENGTH,
        offset: (CODE_LENGTH + DATA_LENGTH) as usize,
        executable: false,
    },
];

/// Offset in the image of `length` bytes at `address`; None when they are not
/// all inside one segment.
pub fn image_offset(address: u64, length: usize) -> Option<usize> {
    SEGMENTS.iter().find_map(|s| {
        let at = address.checked_sub(s.base)?;
        (at.checked_add(length as u64)? <= s.length).then_some(s.offset + at as usize)
    })
}

/// Address of the byte at `offset` of the image.
pub fn image_address(offset: usize) -> u64 {
    let s = SEGMENTS.iter().rev().find(|s| offset >= s.offset).unwrap_or(&SEGMENTS[0]);
    s.base + (offset - s.offset) as u64
}

/// What memory holds before a case's patches: INT3 in the code segment,
/// numbers of every kind in the data segment, values that may serve as return
/// addresses or pointers on the stack.
pub fn base_image() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let mut random = Random::new(0x6261_7365);
        let mut image = vec![0xcc; IMAGE_LENGTH];
        for line in image[CODE_LENGTH as usize..].chunks_exact_mut(LINE) {
            let kind = random.below(8);
            for at in (0..LINE).step_by(8) {
                let value = match kind {
                    0 => 0,
                    1 => random.next(),
                    2 => random.integer(),
                    3 => DATA + random.below(DATA_LENGTH),
                    4 => random.double(),
                    5 => random.float() | random.float() << 32,
                    6 => random.next() & 0x3f3f_3f3f_3f3f_3f3f,
                    _ => random.below(16),
                };
                line[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        image
    })
}

/// Lines that differ from the base image, as (image offset, bytes).
///
/// # Safety
/// `segment(i)` must return the address of `SEGMENTS[i].length` readable bytes.
pub unsafe fn changed_lines(mut segment: impl FnMut(usize) -> *const u8) -> Vec<(usize, [u8; LINE])> {
    const STEP: usize = 1024;
    let image = base_image();
    let mut lines = Vec::new();
    for (i, s) in SEGMENTS.iter().enumerate() {
        // SAFETY: promised by the caller; nothing writes during the scan.
        let memory = unsafe { std::slice::from_raw_parts(segment(i), s.length as usize) };
        let expected = &image[s.offset..s.offset + s.length as usize];
        for at in (0..memory.len()).step_by(STEP) {
            if memory[at..at + STEP] == expected[at..at + STEP] {
                continue;
            }
            for at in (at..at + STEP).step_by(LINE) {
                if memory[at..at + LINE] != expected[at..at + LINE] {
                    lines.push((s.offset + at, memory[at..at + LINE].try_into().unwrap()));
                }
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_and_addresses_are_inverse() {
        for s in SEGMENTS {
            for at in [0, 1, s.length - 1] {
                let offset = image_offset(s.base + at, 1).unwrap();
                assert_eq!(image_address(offset), s.base + at);
            }
            assert_eq!(image_offset(s.base + s.length, 1), None);
            assert_eq!(image_offset(s.base + s.length - 4, 8), None);
            assert_eq!(image_offset(s.base - 1, 1), None);
        }
    }

    #[test]
    fn a_changed_byte_is_found() {
        let mut image = base_image().to_vec();
        image[CODE_LENGTH as usize + 130] ^= 1;
        let copy = image.clone();
        // SAFETY: the copy holds every segment.
        let lines = unsafe { changed_lines(|i| copy[SEGMENTS[i].offset..].as_ptr()) };
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].0, CODE_LENGTH as usize + 128);
    }
}
