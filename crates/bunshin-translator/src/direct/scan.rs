//! The search for instructions that run in user mode without a trap and would show the
//! host instead of the guest: CPUID 0F A2, XGETBV 0F 01 D0, RDPID F3 0F C7 F8-FF, RDTSCP
//! 0F 01 F9 (it gives the processor's number besides the time), VMMCALL 0F 01 D9.
//!
//! Where instructions begin is not known, so every byte is taken for a beginning. Those
//! that reach over the page's end belong to the page in which they begin.

/// Where instructions begin, or may begin, that show the host: offsets in `page`. `next`
/// is how the page behind it begins, if code can run on into that.
pub fn suspects(page: &[u8], next: Option<[u8; 2]>) -> Vec<usize> {
    let mut found = Vec::new();
    let at = |n: usize| page.get(n).copied().or_else(|| next?.get(n - page.len()).copied());
    let mut from = 0;
    while let Some(step) = escape_in(&page[from..]) {
        let escape = from + step;
        from = escape + 1;
        let rdpid = match (at(escape + 1), at(escape + 2)) {
            (Some(0xa2), _) | (Some(0x01), Some(0xd0 | 0xd9 | 0xf9)) => false,
            (Some(0xc7), Some(0xf8..=0xff)) => true,
            _ => continue,
        };
        let mut first = escape;
        while first > 0 && is_prefix(page[first - 1]) {
            first -= 1;
        }
        // At the page's beginning prefixes may lie in the page before it.
        if rdpid && first > 0 && !page[first..escape].contains(&0xf3) {
            continue;
        }
        found.extend(first..=escape);
    }
    found
}

/// Its last bytes are an instruction that shows the host, or not, depending on the page
/// behind it.
pub fn ends_open(page: &[u8]) -> bool {
    matches!(page, [.., 0x0f] | [.., 0x0f, 0x01 | 0xc7])
}

/// Where the first 0F is. Eight bytes at a time: all code that runs is searched.
fn escape_in(bytes: &[u8]) -> Option<usize> {
    const ONES: u64 = u64::MAX / 0xff;
    let mut words = bytes.chunks_exact(8);
    let mut at = 0;
    for word in &mut words {
        let other = u64::from_le_bytes(word.try_into().unwrap()) ^ (0x0f * ONES);
        // The lowest bit is right: borrows come from zero bytes only.
        let zero = other.wrapping_sub(ONES) & !other & (ONES << 7);
        if zero != 0 {
            return Some(at + (zero.trailing_zeros() / 8) as usize);
        }
        at += 8;
    }
    words.remainder().iter().position(|&b| b == 0x0f).map(|n| at + n)
}

fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(at: usize, bytes: &[u8]) -> [u8; 4096] {
        let mut page = [0x90; 4096];
        page[at..at + bytes.len()].copy_from_slice(bytes);
        page
    }

    #[test]
    fn each_is_found_wherever_it_begins() {
        let all: [&[u8]; 7] = [
            &[0x0f, 0xa2],
            &[0x66, 0x0f, 0xa2],
            &[0x0f, 0x01, 0xd0],
            &[0x0f, 0x01, 0xf9],
            &[0x0f, 0x01, 0xd9],
            &[0xf3, 0x0f, 0xc7, 0xf8],
            &[0xf3, 0x41, 0x0f, 0xc7, 0xff],
        ];
        for bytes in all {
            for at in [0, 1, 77, 4096 - bytes.len()] {
                let found = suspects(&page(at, bytes), None);
                assert!(found.contains(&at), "{bytes:x?} at {at}");
                assert!(found.iter().all(|f| (at..at + bytes.len()).contains(f)));
            }
        }
    }

    #[test]
    fn the_seam_between_two_pages_counts() {
        let cut = page(4095, &[0x0f]);
        assert_eq!(suspects(&cut, Some([0xa2, 0x90])), [4095]);
        assert_eq!(suspects(&cut, Some([0x01, 0xd0])), [4095]);
        assert!(suspects(&cut, Some([0x84, 0x90])).is_empty());
        assert!(suspects(&cut, None).is_empty());
        assert_eq!(suspects(&page(4094, &[0x0f, 0x01]), Some([0xf9, 0x90])), [4094]);
    }

    #[test]
    fn an_end_is_open_where_the_next_page_decides() {
        let cases: [(usize, &[u8], bool); 7] = [
            (4095, &[0x0f], true),
            (4094, &[0x0f, 0x01], true),
            (4094, &[0x0f, 0xc7], true),
            (4094, &[0x0f, 0xa2], false),
            (4094, &[0x0f, 0x84], false),
            (4093, &[0x0f, 0x01, 0xd0], false),
            (0, &[0x90], false),
        ];
        for (at, bytes, open) in cases {
            assert_eq!(ends_open(&page(at, bytes)), open, "{bytes:x?} at {at}");
        }
    }

    #[test]
    fn the_first_escape_is_found_in_any_place() {
        for at in 0..40 {
            for length in 0..40 {
                let mut bytes = [0x0e; 40];
                bytes[at] = 0x0f;
                assert_eq!(escape_in(&bytes[..length]), (at < length).then_some(at));
            }
        }
    }

    #[test]
    fn ordinary_code_is_not_taken_for_one() {
        // RDSEED, CMPXCHG8B, SGDT, SYSCALL, a near branch.
        let all: [&[u8]; 5] = [
            &[0x0f, 0xc7, 0xf8],
            &[0x0f, 0xc7, 0x0e],
            &[0x0f, 0x01, 0x00],
            &[0x0f, 0x05],
            &[0x0f, 0x84, 1, 0],
        ];
        for bytes in all {
            assert!(suspects(&page(100, bytes), Some([0x90, 0x90])).is_empty(), "{bytes:x?}");
        }
        assert!(suspects(&[0x90; 4096], None).is_empty());
    }
}
