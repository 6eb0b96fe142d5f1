//! When a wait for others says that it goes on: after 5, 15 and 60 s, then every minute.

use std::time::Duration;

/// The times to speak, counted from the wait's start. Endless.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    given: u32,
}

impl Marks {
    /// The next time to speak.
    pub(crate) fn advance(&mut self) -> Duration {
        let seconds = match self.given {
            0 => 5,
            1 => 15,
            later => u64::from(later - 1) * 60,
        };
        self.given = self.given.saturating_add(1);
        Duration::from_secs(seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_words_come_soon_and_the_later_ones_each_minute() {
        let mut marks = Marks::default();
        let seconds: Vec<u64> = (0..5).map(|_| marks.advance().as_secs()).collect();
        assert_eq!(seconds, [5, 15, 60, 120, 180]);
    }
}
