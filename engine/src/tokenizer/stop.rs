//! Stop strings over a stream of text: only what could still become one is held back.
//!
//! The text ends at the stop string that is complete first; of several that end there, the longest. So the
//! result does not depend on how the text was cut into pieces.

/// What a piece of text gave.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopStep {
    /// Text that may go out now.
    pub text: String,
    /// Index of the stop string that ended the text. Nothing comes after it.
    pub stopped: Option<usize>,
}

/// One stop string with its failure links (Knuth, Morris and Pratt).
#[derive(Debug, Clone)]
struct Pattern {
    index: usize,
    bytes: Vec<u8>,
    /// `links[n]`: length of the longest proper prefix that is also a suffix of the first `n + 1` bytes.
    links: Vec<usize>,
    /// Bytes of it that the text read so far ends with.
    matched: usize,
}

impl Pattern {
    fn new(index: usize, text: &str) -> Self {
        let bytes = text.as_bytes().to_vec();
        let mut links = vec![0; bytes.len()];
        let mut length = 0;
        for position in 1..bytes.len() {
            while length > 0 && bytes[position] != bytes[length] {
                length = links[length - 1];
            }
            length += usize::from(bytes[position] == bytes[length]);
            links[position] = length;
        }
        Self {
            index,
            bytes,
            links,
            matched: 0,
        }
    }

    /// Reads one byte; whether the string is complete with it.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.links[self.matched - 1];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

/// Finds stop strings in text that comes in pieces.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    include_stop: bool,
    held: String,
    stopped: Option<usize>,
}

impl StopMatcher {
    /// Empty stop strings never match. With `include_stop` the text ends after the stop string, else before it.
    #[must_use]
    pub fn new<S: AsRef<str>>(stops: &[S], include_stop: bool) -> Self {
        let patterns = stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.as_ref().is_empty())
            .map(|(index, stop)| Pattern::new(index, stop.as_ref()))
            .collect();
        Self {
            patterns,
            include_stop,
            held: String::new(),
            stopped: None,
        }
    }

    /// Takes a piece of text. After a stop string everything is dropped.
    #[must_use]
    pub fn push(&mut self, text: &str) -> StopStep {
        if self.stopped.is_some() {
            return StopStep {
                text: String::new(),
                stopped: self.stopped,
            };
        }
        if self.patterns.is_empty() {
            return StopStep {
                text: text.to_owned(),
                stopped: None,
            };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (offset, byte) in text.bytes().enumerate() {
            if let Some((index, length)) = self.complete_with(byte) {
                return self.stop_at(before + offset + 1, index, length);
            }
        }
        let withheld = self.patterns.iter().map(|p| p.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - withheld);
        StopStep {
            text: std::mem::replace(&mut self.held, rest),
            stopped: None,
        }
    }

    /// Ends the text; returns what was held back. Empty after a stop string.
    #[must_use]
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Index of the stop string that ended the text.
    #[must_use]
    pub fn stopped(&self) -> Option<usize> {
        self.stopped
    }

    /// Reads one byte: the longest string that ends with it, as index and length.
    fn complete_with(&mut self, byte: u8) -> Option<(usize, usize)> {
        let mut found: Option<(usize, usize)> = None;
        for pattern in &mut self.patterns {
            let length = pattern.bytes.len();
            if pattern.step(byte) && found.is_none_or(|(_, longest)| length > longest) {
                found = Some((pattern.index, length));
            }
        }
        found
    }

    fn stop_at(&mut self, end: usize, index: usize, length: usize) -> StopStep {
        let cut = if self.include_stop { end } else { end - length };
        let mut text = std::mem::take(&mut self.held);
        text.truncate(cut);
        self.stopped = Some(index);
        StopStep {
            text,
            stopped: self.stopped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The end of the text as a search over all of it finds it: cut position and index.
    fn naive(text: &str, stops: &[String], include_stop: bool) -> (String, Option<usize>) {
        let mut best: Option<(usize, std::cmp::Reverse<usize>, usize)> = None;
        for (index, stop) in stops.iter().enumerate().filter(|(_, s)| !s.is_empty()) {
            let end =
                (0..=text.len()).find(|&end| text.as_bytes()[..end].ends_with(stop.as_bytes()));
            if let Some(end) = end {
                let candidate = (end, std::cmp::Reverse(stop.len()), index);
                best = Some(best.map_or(candidate, |best| best.min(candidate)));
            }
        }
        match best {
            None => (text.to_owned(), None),
            Some((end, std::cmp::Reverse(length), index)) => {
                let cut = if include_stop { end } else { end - length };
                (text[..cut].to_owned(), Some(index))
            }
        }
    }

    fn streamed(
        pieces: &[String],
        stops: &[String],
        include_stop: bool,
    ) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops, include_stop);
        let mut out = String::new();
        for piece in pieces {
            out.push_str(&matcher.push(piece).text);
        }
        out.push_str(&matcher.finish());
        (out, matcher.stopped())
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop() {
        let mut matcher = StopMatcher::new(&["END"], false);
        assert_eq!(matcher.push("go on E").text, "go on ");
        assert_eq!(matcher.push("N").text, "");
        assert_eq!(matcher.push("OUGH ENE").text, "ENOUGH EN");
        assert_eq!(matcher.finish(), "E");
    }

    #[test]
    fn cuts_before_or_after_and_says_which() {
        let pieces = [
            "one tw".to_owned(),
            "o thr".to_owned(),
            "ee four".to_owned(),
        ];
        let stops = ["four".to_owned(), "two".to_owned()];
        assert_eq!(
            streamed(&pieces, &stops, false),
            ("one ".to_owned(), Some(1))
        );
        assert_eq!(
            streamed(&pieces, &stops, true),
            ("one two".to_owned(), Some(1))
        );
    }

    #[test]
    fn overlapping_stops_end_at_the_first_complete_one() {
        let pieces = ["ax".to_owned(), "ab".to_owned(), "c".to_owned()];
        let stops = ["xabc".to_owned(), "ab".to_owned()];
        assert_eq!(streamed(&pieces, &stops, false), ("ax".to_owned(), Some(1)));
        let stops = ["b".to_owned(), "xab".to_owned()];
        assert_eq!(streamed(&pieces, &stops, false), ("a".to_owned(), Some(1)));
    }

    #[test]
    fn multi_byte_text_is_never_split() {
        let mut matcher = StopMatcher::new(&["é!"], false);
        assert_eq!(matcher.push("è").text, "è");
        assert_eq!(matcher.push("é").text, "");
        assert_eq!(matcher.push("é").text, "é");
        let step = matcher.push("!rest");
        assert_eq!((step.text.as_str(), step.stopped), ("", Some(0)));
        assert_eq!(
            matcher.push("more"),
            StopStep {
                text: String::new(),
                stopped: Some(0)
            }
        );
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn without_stops_everything_passes() {
        let mut matcher = StopMatcher::new(&[""], false);
        assert_eq!(matcher.push("text").text, "text");
        assert_eq!(matcher.finish(), "");
    }

    proptest! {
        #[test]
        fn equals_the_search_over_the_whole(
            pieces in prop::collection::vec("[abé😀]{0,5}", 0..12),
            stops in prop::collection::vec("[abé😀]{0,4}", 0..4),
            include_stop: bool,
        ) {
            let whole = pieces.concat();
            prop_assert_eq!(
                streamed(&pieces, &stops, include_stop),
                naive(&whole, &stops, include_stop)
            );
        }

        #[test]
        fn never_holds_back_more_than_needed(
            pieces in prop::collection::vec("[ab]{0,4}", 0..12),
            stop in "[ab]{1,4}",
        ) {
            let mut matcher = StopMatcher::new(&[&stop], false);
            let (mut read, mut out) = (String::new(), String::new());
            for piece in &pieces {
                read.push_str(piece);
                let step = matcher.push(piece);
                out.push_str(&step.text);
                if step.stopped.is_some() {
                    break;
                }
                let held = &read[out.len()..];
                let longest = (0..stop.len()).rev().find(|&n| read.ends_with(&stop[..n]));
                prop_assert_eq!(Some(held.len()), longest);
            }
        }
    }
}
