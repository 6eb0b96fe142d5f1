//! Rotary frequencies with their scalings, computed once in double precision: plain, linear, Llama 3's, YaRN, and
//! the per-frequency divisors of GGUF files.

use std::f64::consts::PI;

use super::CONTEXT_LEN_MAX;
use crate::backend::{RopePairing, RopeTable};
use crate::model::error::ModelErrorKind;

/// How a model was stretched beyond the context it was trained on.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by a factor.
    Linear { factor: f64 },
    /// Llama 3: long wavelengths are divided, short ones kept, those between blended.
    Llama3(Llama3),
    /// YaRN (<https://arxiv.org/abs/2309.00071>).
    Yarn(Yarn),
}

/// Llama 3's parameters.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Llama3 {
    pub(super) factor: f64,
    pub(super) low_freq_factor: f64,
    pub(super) high_freq_factor: f64,
    pub(super) original_len: f64,
}

/// YaRN's parameters.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Yarn {
    pub(super) factor: f64,
    pub(super) original_len: f64,
    /// Multiplies sine and cosine.
    pub(super) magnitude: f64,
    pub(super) beta_fast: f64,
    pub(super) beta_slow: f64,
    /// Round the ramp's ends to whole dimensions.
    pub(super) truncate: bool,
}

impl Llama3 {
    fn scale(&self, frequencies: &mut [f64]) -> Result<(), ModelErrorKind> {
        let (low, high) = (self.low_freq_factor, self.high_freq_factor);
        positive("rope scaling factor", self.factor)?;
        positive("low_freq_factor", low)?;
        positive("high_freq_factor", high)?;
        positive("original_max_position_embeddings", self.original_len)?;
        if high <= low {
            return Err(ModelErrorKind::config(
                "high_freq_factor",
                format!("is {high}, not above low_freq_factor {low}"),
            ));
        }
        for frequency in frequencies {
            let turns = self.original_len * *frequency / (2.0 * PI);
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            *frequency *= kept + (1.0 - kept) / self.factor;
        }
        Ok(())
    }
}

impl Yarn {
    /// The paper's magnitude for a factor.
    pub(super) fn magnitude_of(factor: f64, scale: f64) -> f64 {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * scale * factor.ln() + 1.0
        }
    }
}

/// What a rotary table is made from.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RopeParameters {
    pub(super) theta: f64,
    pub(super) head_dim: usize,
    pub(super) pairing: RopePairing,
    pub(super) scaling: RopeScaling,
    /// GGUF's `rope_freqs.weight`: divides each frequency.
    pub(super) divisors: Option<Vec<f32>>,
}

impl RopeParameters {
    /// The longest context: what the file says, or further where YaRN stretches a shorter original.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates, and is bounded"
    )]
    pub(super) fn reach(&self, context_len: usize) -> usize {
        match &self.scaling {
            RopeScaling::Yarn(yarn) => {
                let stretched = (yarn.original_len * yarn.factor) as usize;
                context_len.max(stretched.min(CONTEXT_LEN_MAX))
            }
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3(_) => context_len,
        }
    }

    /// The table, or the parameter that makes none.
    pub(super) fn table(&self) -> Result<RopeTable, ModelErrorKind> {
        positive("rope theta", self.theta)?;
        let mut frequencies: Vec<f64> = (0..self.head_dim / 2)
            .map(|index| {
                self.theta
                    .powf(-(2.0 * index as f64) / self.head_dim as f64)
            })
            .collect();
        if let Some(divisors) = &self.divisors {
            for (frequency, &divisor) in frequencies.iter_mut().zip(divisors) {
                positive("rope_freqs.weight", f64::from(divisor))?;
                *frequency /= f64::from(divisor);
            }
        }
        let magnitude = match &self.scaling {
            RopeScaling::None => 1.0,
            RopeScaling::Linear { factor } => {
                positive("rope scaling factor", *factor)?;
                frequencies
                    .iter_mut()
                    .for_each(|frequency| *frequency /= factor);
                1.0
            }
            RopeScaling::Llama3(llama3) => {
                llama3.scale(&mut frequencies)?;
                1.0
            }
            RopeScaling::Yarn(yarn) => {
                self.scale_yarn(yarn, &mut frequencies)?;
                yarn.magnitude
            }
        };
        Ok(RopeTable {
            inverse_frequencies: frequencies.into_iter().map(narrow).collect(),
            pairing: self.pairing,
            magnitude: narrow(magnitude),
        })
    }

    fn scale_yarn(&self, yarn: &Yarn, frequencies: &mut [f64]) -> Result<(), ModelErrorKind> {
        positive("rope scaling factor", yarn.factor)?;
        positive("original_max_position_embeddings", yarn.original_len)?;
        positive("attention_factor", yarn.magnitude)?;
        positive("beta_fast", yarn.beta_fast)?;
        positive("beta_slow", yarn.beta_slow)?;
        if self.theta <= 1.0 {
            return Err(ModelErrorKind::config(
                "rope theta",
                format!("is {}, but YaRN needs it above 1", self.theta),
            ));
        }
        // The dimension whose wave turns `beta` times within the original context.
        let dimension = |beta: f64| {
            self.head_dim as f64 * (yarn.original_len / (beta * 2.0 * PI)).ln()
                / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (dimension(yarn.beta_fast), dimension(yarn.beta_slow));
        if yarn.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let low = low.max(0.0);
        let high = high.min(self.head_dim as f64 - 1.0);
        // The reference widens an empty ramp by this much.
        let span = if high == low { 0.001 } else { high - low };
        for (index, frequency) in frequencies.iter_mut().enumerate() {
            let stretched = ((index as f64 - low) / span).clamp(0.0, 1.0);
            *frequency *= (1.0 - stretched) + stretched / yarn.factor;
        }
        Ok(())
    }
}

fn positive(key: &str, value: f64) -> Result<(), ModelErrorKind> {
    if value.is_finite() && value > 0.0 {
        Ok(())
    } else {
        Err(ModelErrorKind::config(
            key,
            format!("is {value}, not a positive number"),
        ))
    }
}

/// Rounds to the precision that the backends compute in.
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to f32 is the purpose"
)]
pub(super) fn narrow(value: f64) -> f32 {
    value as f32
}
