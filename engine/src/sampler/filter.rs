//! Top-k, top-p and min-p: which tokens may be drawn, and with which weight.

use std::cmp::Ordering;

use crate::backend::{Draw, TokenId};

/// Unnormalised probabilities `exp((logit - best) / temperature)`: the best token weighs 1.
#[derive(Debug)]
pub(super) struct Weights<'a> {
    pub(super) logits: &'a [f32],
    pub(super) best: f32,
    pub(super) temperature: f32,
}

impl Weights<'_> {
    fn of(&self, token: TokenId) -> f32 {
        self.of_logit(self.logits[token as usize])
    }

    fn of_logit(&self, logit: f32) -> f32 {
        ((logit - self.best) / self.temperature).exp()
    }

    fn total(&self) -> f64 {
        self.logits
            .iter()
            .map(|&logit| f64::from(self.of_logit(logit)))
            .sum()
    }
}

/// Fills `kept` with the tokens that may be drawn. `order` is a buffer.
pub(super) fn keep(
    weights: &Weights<'_>,
    how: &Draw,
    order: &mut Vec<TokenId>,
    kept: &mut Vec<(TokenId, f32)>,
) {
    kept.clear();
    let vocab = weights.logits.len();
    let top_k = match how.top_k as usize {
        0 => vocab,
        k => k.min(vocab),
    };
    if top_k < vocab {
        best_tokens(weights.logits, top_k, order);
        kept.extend(order.iter().map(|&token| (token, weights.of(token))));
        let total = kept.iter().map(|&(_, weight)| f64::from(weight)).sum();
        truncate_to_mass(kept, how.top_p, total);
    } else if how.top_p < 1.0 {
        keep_mass(weights, how.top_p, order, kept);
    } else {
        kept.extend((0..).zip(weights.logits.iter().map(|&logit| weights.of_logit(logit))));
    }
    if how.min_p > 0.0 {
        kept.retain(|&(_, weight)| weight >= how.min_p.min(1.0));
    }
}

/// Keeps the smallest set of best tokens whose mass reaches `top_p`, looking at few tokens where few are enough.
fn keep_mass(
    weights: &Weights<'_>,
    top_p: f32,
    order: &mut Vec<TokenId>,
    kept: &mut Vec<(TokenId, f32)>,
) {
    let vocab = weights.logits.len();
    let total = weights.total();
    let mut count = 128;
    loop {
        count = count.min(vocab);
        best_tokens(weights.logits, count, order);
        kept.clear();
        kept.extend(order.iter().map(|&token| (token, weights.of(token))));
        if truncate_to_mass(kept, top_p, total) || count == vocab {
            return;
        }
        count *= 16;
    }
}

/// Cuts a list that is sorted by weight; says whether it held the asked share of `total`.
fn truncate_to_mass(kept: &mut Vec<(TokenId, f32)>, top_p: f32, total: f64) -> bool {
    if top_p >= 1.0 {
        return true;
    }
    let wanted = f64::from(top_p) * total;
    let mut mass = 0.0;
    for index in 0..kept.len() {
        mass += f64::from(kept[index].1);
        if mass >= wanted {
            kept.truncate(index + 1);
            return true;
        }
    }
    false
}

/// The `count` best tokens, best first, ties by id.
pub(super) fn best_tokens(logits: &[f32], count: usize, order: &mut Vec<TokenId>) {
    order.clear();
    let vocab = TokenId::try_from(logits.len()).expect("token ids are 32 bits");
    let count = count.min(logits.len());
    order.extend(0..vocab);
    let better = |a: &TokenId, b: &TokenId| {
        logits[*b as usize]
            .partial_cmp(&logits[*a as usize])
            .unwrap_or(Ordering::Equal)
            .then(a.cmp(b))
    };
    if count == 0 {
        order.clear();
    } else if count < order.len() {
        order.select_nth_unstable_by(count - 1, better);
        order.truncate(count);
    }
    order.sort_unstable_by(better);
}
