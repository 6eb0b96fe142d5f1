//! Host lists to hosts.

use super::{DIGITS_MAX, ENTRIES_MAX, HOST_BYTES_MAX, ListError, ListErrorKind, is_host_byte};

/// A piece of a name: fixed text, or numbers in brackets.
#[derive(Debug)]
enum Part<'a> {
    Text(&'a str),
    Numbers(Vec<Range>),
}

/// `first..=last`, written with at least `width` digits.
#[derive(Debug, Clone, Copy)]
struct Range {
    first: u64,
    last: u64,
    width: usize,
}

impl Range {
    fn count(self) -> u64 {
        self.last - self.first + 1
    }
}

/// All hosts of a list, in its order.
///
/// # Errors
/// When the text is not a host list, or names more than [`ENTRIES_MAX`](super::ENTRIES_MAX) hosts.
pub fn expand(text: &str) -> Result<Vec<String>, ListError> {
    let mut parser = Parser { text, at: 0 };
    let mut hosts = Vec::new();
    loop {
        let start = parser.at;
        let parts = parser.name()?;
        let count = checked_count(&parts)
            .filter(|count| hosts.len() + count <= ENTRIES_MAX)
            .ok_or_else(|| ListError::new(ListErrorKind::TooMany, text, start))?;
        if longest(&parts) > HOST_BYTES_MAX {
            return Err(ListError::new(ListErrorKind::LongName, text, start));
        }
        hosts.reserve(count);
        push_names(&parts, &mut String::new(), &mut hosts);
        if parser.at == text.len() {
            return Ok(hosts);
        }
        parser.at += 1;
    }
}

fn checked_count(parts: &[Part<'_>]) -> Option<usize> {
    let mut product: u64 = 1;
    for part in parts {
        if let Part::Numbers(ranges) = part {
            let sum = ranges
                .iter()
                .try_fold(0_u64, |sum, range| sum.checked_add(range.count()))?;
            product = product.checked_mul(sum)?;
        }
        if product > u64::try_from(ENTRIES_MAX).ok()? {
            return None;
        }
    }
    usize::try_from(product).ok()
}

fn longest(parts: &[Part<'_>]) -> usize {
    parts
        .iter()
        .map(|part| match part {
            Part::Text(text) => text.len(),
            Part::Numbers(ranges) => ranges
                .iter()
                .map(|range| range.width.max(range.last.to_string().len()))
                .max()
                .unwrap_or(0),
        })
        .sum()
}

/// Depth is the number of parts, which the length of a name bounds.
fn push_names(parts: &[Part<'_>], name: &mut String, hosts: &mut Vec<String>) {
    let Some((first, rest)) = parts.split_first() else {
        hosts.push(name.clone());
        return;
    };
    let length = name.len();
    match first {
        Part::Text(text) => {
            name.push_str(text);
            push_names(rest, name, hosts);
        }
        Part::Numbers(ranges) => {
            for range in ranges {
                for number in range.first..=range.last {
                    name.truncate(length);
                    name.push_str(&format!("{number:0width$}", width = range.width));
                    push_names(rest, name, hosts);
                }
            }
        }
    }
    name.truncate(length);
}

#[derive(Debug)]
struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn error(&self, kind: ListErrorKind) -> ListError {
        ListError::new(kind, self.text, self.at)
    }

    /// One entry, up to the comma after it or the end.
    fn name(&mut self) -> Result<Vec<Part<'a>>, ListError> {
        let mut parts = Vec::new();
        loop {
            match self.peek() {
                None | Some(b',') if parts.is_empty() => {
                    return Err(self.error(ListErrorKind::Empty));
                }
                None | Some(b',') => return Ok(parts),
                Some(b'[') => parts.push(self.brackets()?),
                Some(b']') => return Err(self.error(ListErrorKind::Unopened)),
                Some(byte) if is_host_byte(byte) => parts.push(Part::Text(self.while_host_byte())),
                Some(_) => return Err(self.error(ListErrorKind::Character)),
            }
            if parts.len() > HOST_BYTES_MAX {
                return Err(self.error(ListErrorKind::LongName));
            }
        }
    }

    fn while_host_byte(&mut self) -> &'a str {
        let start = self.at;
        while self.peek().is_some_and(is_host_byte) {
            self.at += 1;
        }
        &self.text[start..self.at]
    }

    fn brackets(&mut self) -> Result<Part<'a>, ListError> {
        let open = self.at;
        self.at += 1;
        let mut ranges = Vec::new();
        loop {
            ranges.push(self.range(open)?);
            if ranges.len() > ENTRIES_MAX {
                return Err(self.error(ListErrorKind::TooMany));
            }
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => {
                    self.at += 1;
                    return Ok(Part::Numbers(ranges));
                }
                Some(b'[') => return Err(self.error(ListErrorKind::Nested)),
                Some(_) => return Err(self.error(ListErrorKind::NotANumber)),
                None => return Err(ListError::new(ListErrorKind::Unclosed, self.text, open)),
            }
        }
    }

    fn range(&mut self, open: usize) -> Result<Range, ListError> {
        let start = self.at;
        let (first, width) = self.number(open)?;
        let mut last = first;
        if self.peek() == Some(b'-') {
            self.at += 1;
            (last, _) = self.number(open)?;
        }
        if last < first {
            return Err(ListError::new(ListErrorKind::Backwards, self.text, start));
        }
        Ok(Range { first, last, width })
    }

    /// A number and its digits.
    fn number(&mut self, open: usize) -> Result<(u64, usize), ListError> {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        let digits = &self.text[start..self.at];
        let kind = match (digits.len(), self.peek()) {
            (1..=DIGITS_MAX, _) => {
                let number = digits.parse().expect("18 digits fit 64 bits");
                return Ok((number, digits.len()));
            }
            (0, None) => return Err(ListError::new(ListErrorKind::Unclosed, self.text, open)),
            (0, Some(b'[')) => ListErrorKind::Nested,
            (0, Some(b',' | b']')) => ListErrorKind::Empty,
            (0, _) => ListErrorKind::NotANumber,
            _ => return Err(ListError::new(ListErrorKind::LongNumber, self.text, start)),
        };
        Err(self.error(kind))
    }
}
