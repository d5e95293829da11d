//! The alphabet of byte-level vocabularies: each byte is written as one printable character
//! (Radford et al. 2019, section 2.2; the table is that of GPT-2's published encoder).
//!
//! Printable Latin-1 bytes stand for themselves, the other 68 for U+0100 onwards in order: the
//! space is `Ġ` (U+0120), the newline `Ċ` (U+010A).

use std::sync::LazyLock;

fn stands_for_itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

static CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut chars = ['\0'; 256];
    let mut moved = 0x100u32;
    for byte in 0..=255u8 {
        chars[usize::from(byte)] = if stands_for_itself(byte) {
            char::from(byte)
        } else {
            moved += 1;
            char::from_u32(moved - 1).expect("U+0100 to U+0143 are characters")
        };
    }
    chars
});

static BYTES: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut bytes = [None; 0x144];
    for byte in 0..=255u8 {
        bytes[CHARS[usize::from(byte)] as usize] = Some(byte);
    }
    bytes
});

/// The character that stands for `byte`.
pub(crate) fn to_char(byte: u8) -> char {
    CHARS[usize::from(byte)]
}

/// The bytes that `token` stands for; nothing if it holds a character outside the alphabet.
pub(crate) fn decode(token: &str) -> Option<Vec<u8>> {
    token.chars().map(|c| BYTES.get(c as usize).copied().flatten()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character() {
        for byte in 0..=255u8 {
            assert_eq!(decode(&to_char(byte).to_string()), Some(vec![byte]));
        }
        assert_eq!(to_char(b' '), 'Ġ');
        assert_eq!(to_char(b'\n'), 'Ċ');
        assert_eq!(decode("Ġthé"), Some(vec![b' ', b't', b'h', 0xE9]));
        assert_eq!(decode("a b"), None);
        assert_eq!(decode("｜"), None);
    }
}
