//! Conditional requests (RFC 9110, section 13): only what revalidating a `GET` needs.

/// Whether an `If-None-Match` list names `tag`, a strong entity tag with its quotes. The comparison is the weak one
/// (RFC 9110, sections 8.8.3.2 and 13.1.2): a cache on the way may have marked the tag as weak.
#[must_use]
pub fn none_match_names(list: &str, tag: &str) -> bool {
    // A foreign tag may have a comma inside its quotes. Its parts are then no whole tags, and so never ours.
    list.split(',').map(str::trim).any(|item| item == "*" || item.strip_prefix("W/").unwrap_or(item) == tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_compare_weakly_and_whole() {
        for list in ["\"a\"", "W/\"a\"", "\"b\", \"a\"", "\"b\" ,W/\"a\",", "*", "\"x,y\",\"a\""] {
            assert!(none_match_names(list, "\"a\""), "{list}");
        }
        for list in ["", "a", "\"A\"", "\"ab\"", "\"b,a\"", "w/\"a\"", "\"b\""] {
            assert!(!none_match_names(list, "\"a\""), "{list}");
        }
    }
}
