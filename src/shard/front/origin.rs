//! Which pages may use this node (Fetch, CORS protocol; RFC 6455, section 10.2).

use crate::wire::http1::{AllowOrigin, Head};

/// Where a request comes from, judged by `allow_origins`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin<'a> {
    /// It may use the node; the answer carries this.
    Allowed(AllowOrigin<'a>),
    /// A page of this foreign origin.
    Foreign(&'a str),
}

impl<'a> Origin<'a> {
    /// Judges a request. Requests without an `Origin` do not come from a foreign page; a page of the node's own host,
    /// or of the proxy in front of it, is not foreign either.
    pub(super) fn of(head: &'a Head, allowed: &[String]) -> Self {
        if allowed.iter().any(|pattern| pattern == "*") {
            return Self::Allowed(AllowOrigin::Any);
        }
        let Some(origin) = head.header("origin") else {
            return Self::Allowed(AllowOrigin::None);
        };
        if allowed.iter().any(|pattern| pattern.eq_ignore_ascii_case(origin)) {
            return Self::Allowed(AllowOrigin::Only(origin));
        }
        let authority = origin.split_once("://").map(|(_, authority)| authority);
        match (authority, head.header("host")) {
            (Some(authority), Some(host)) if authority.eq_ignore_ascii_case(host) => Self::Allowed(AllowOrigin::None),
            _ => Self::Foreign(origin),
        }
    }

    /// What the answer carries.
    pub(super) fn allow(self) -> AllowOrigin<'a> {
        match self {
            Self::Allowed(allow) => allow,
            Self::Foreign(_) => AllowOrigin::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::http1::parse_head;

    fn judged(origin: &str, allowed: &[&str]) -> String {
        let text = format!("GET / HTTP/1.1\r\nHost: node.example:8080\r\n{origin}\r\n");
        let (head, _) = parse_head(text.as_bytes()).unwrap().unwrap();
        let allowed: Vec<String> = allowed.iter().map(|pattern| pattern.to_string()).collect();
        format!("{:?}", Origin::of(&head, &allowed))
    }

    #[test]
    fn only_foreign_pages_are_refused() {
        let allowed = ["https://a.example", "http://localhost:3000"];
        assert_eq!(judged("", &allowed), "Allowed(None)");
        assert_eq!(judged("Origin: https://A.example\r\n", &allowed), "Allowed(Only(\"https://A.example\"))");
        assert_eq!(judged("Origin: https://node.example:8080\r\n", &allowed), "Allowed(None)");
        assert_eq!(judged("Origin: https://a.example.evil\r\n", &allowed), "Foreign(\"https://a.example.evil\")");
        assert_eq!(judged("Origin: http://a.example\r\n", &allowed), "Foreign(\"http://a.example\")");
        assert_eq!(judged("Origin: null\r\n", &allowed), "Foreign(\"null\")");
        assert_eq!(judged("Origin: https://b.example\r\n", &["*"]), "Allowed(Any)");
        assert_eq!(judged("Origin: https://b.example\r\n", &[]), "Foreign(\"https://b.example\")");
    }
}
