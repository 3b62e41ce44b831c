//! Texts that somebody else wrote.

/// The beginning of a text, of at most so many bytes and whole characters.
pub(crate) fn beginning(text: &str, most: usize) -> &str {
    let mut end = most.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_are_of_whole_characters() {
        assert_eq!(beginning("xüz", 2), "x");
        assert_eq!(beginning("xüz", 3), "xü");
        assert_eq!(beginning("xüz", 9), "xüz");
        assert_eq!(beginning("ü", 0), "");
    }
}
