//! The next step begins before this one's results are read, and nobody can tell by the answers.

use super::*;
use crate::request::RequestId;

fn overlapping() -> EngineConfig {
    EngineConfig {
        overlap: true,
        ..small_config()
    }
}

fn models() -> [FakeModel; 2] {
    [FakeModel::new(), FakeModel::by_itself()]
}

fn assert_answer(reader: &mut Reader, request: &GenerateRequest) {
    let (tokens, reason) = closed_form(request, 64);
    let answer = reader.read();
    assert_eq!(answer.tokens, tokens, "{request:?}");
    assert_eq!(answer.reason(), reason);
    assert_logprobs(request, answer);
}

/// Greedy and drawn ones, with and without an end of their own, and some that need the host to choose.
fn mixed() -> Vec<GenerateRequest> {
    (0..24)
        .map(|n| {
            let mut request = request(&[1 + n, 3, 1 + n % 5, 9, 2 + n / 2], 1 + 3 * n % 30);
            if n % 3 == 1 {
                request.sampling.temperature = 0.7;
                request.sampling.top_p = 0.9;
                request.sampling.seed = n.into();
            }
            request.sampling.ignore_eos = n % 4 == 0;
            if n % 5 == 2 {
                request.sampling.stop_token_ids = vec![7, 11, 19, 23];
            }
            if n % 8 == 5 {
                request.sampling.logprobs = Some(1);
            }
            if n % 4 == 3 {
                request.sampling.repetition_penalty = 1.5;
                request.sampling.presence_penalty = 0.25;
            }
            if n % 6 == 4 {
                request.sampling.min_tokens = 6;
                request.sampling.logit_bias = vec![(EOS, 8.0), (7, -2.0)];
            }
            request
        })
        .collect()
}

#[test]
fn answers_are_the_same() {
    for model in models() {
        let mut rig = Rig::of(model, overlapping(), 100);
        let requests = mixed();
        let mut readers: Vec<_> = requests.iter().map(|r| rig.submit(r.clone())).collect();
        rig.run();
        for (reader, request) in readers.iter_mut().zip(&requests) {
            assert_answer(reader, request);
        }
        rig.assert_clean();
    }
}

#[test]
fn the_device_is_idle_only_when_nothing_is_left() {
    let model = FakeModel::by_itself();
    let counts = Arc::clone(&model.counts);
    let mut rig = Rig::of(model, overlapping(), 100);
    let wanted = request(&long_running(5), 30);
    let mut reader = rig.submit(wanted.clone());
    rig.run();
    assert_answer(&mut reader, &wanted);
    let counts = counts.lock().expect("nobody panicked");
    // The length is known beforehand, so no step is computed for nothing.
    assert_eq!((counts.begun, counts.alone), (30, 1));
}

#[test]
fn an_end_that_was_not_foreseen_costs_one_row_that_nobody_sees() {
    let wanted = (1..)
        .map(|n| request(&[n, 4, 2], 40))
        .find(|request| {
            let (tokens, reason) = closed_form(request, 64);
            reason == FinishReason::Eos && tokens.len() > 2
        })
        .expect("some answer ends");
    let model = FakeModel::by_itself();
    let counts = Arc::clone(&model.counts);
    let mut rig = Rig::of(model, overlapping(), 100);
    let mut reader = rig.submit(wanted.clone());
    rig.run();
    assert_answer(&mut reader, &wanted);
    let begun = counts.lock().expect("nobody panicked").begun;
    assert_eq!(begun, reader.answer.tokens.len() + 1);
    rig.assert_clean();
}

#[test]
fn what_a_device_changes_and_tells_is_overtaken() {
    let model = FakeModel::by_itself();
    let counts = Arc::clone(&model.counts);
    let mut rig = Rig::of(model, overlapping(), 100);
    let mut wanted = request(&long_running(5), 12);
    wanted.sampling.frequency_penalty = 0.5;
    wanted.sampling.repetition_penalty = 1.2;
    wanted.sampling.min_tokens = 4;
    wanted.sampling.logit_bias = vec![(3, 2.0)];
    wanted.sampling.logprobs = Some(20);
    wanted.sampling.prompt_logprobs = Some(0);
    wanted.sampling.ignore_eos = true;
    let mut reader = rig.submit(wanted.clone());
    rig.run();
    assert_answer(&mut reader, &wanted);
    let counts = counts.lock().expect("nobody panicked");
    assert_eq!((counts.begun, counts.alone), (12, 1));
}

#[test]
fn a_step_whose_logits_are_needed_is_not_overtaken() {
    let model = FakeModel::by_itself();
    let counts = Arc::clone(&model.counts);
    let mut rig = Rig::of(model, overlapping(), 100);
    let mut wanted = request(&long_running(5), 12);
    // More than a device tells.
    wanted.sampling.logprobs = Some(21);
    wanted.sampling.ignore_eos = true;
    let mut reader = rig.submit(wanted.clone());
    rig.run();
    assert_answer(&mut reader, &wanted);
    let counts = counts.lock().expect("nobody panicked");
    assert_eq!(counts.begun, counts.alone);
}

#[test]
fn what_a_step_under_way_may_write_is_not_free() {
    for model in models() {
        let mut rig = Rig::of(model, overlapping(), 100);
        let mut reader = rig.submit(request(&long_running(1), 40));
        for _ in 0..4 {
            rig.step();
        }
        let used = rig.stats().blocks_used;
        assert!(used > 0 && rig.core.flight.is_some());
        let id: RequestId = reader.stream.as_ref().expect("open").id();
        rig.handle.cancel(id);
        assert_eq!(rig.stats().blocks_used, used);
        assert_eq!(reader.read().reason(), FinishReason::Cancelled);
        rig.run();
        rig.assert_clean();
    }
}

#[test]
fn the_youngest_gives_way_only_between_steps() {
    for model in models() {
        let config = EngineConfig {
            block_count: 16,
            ..overlapping()
        };
        let mut rig = Rig::of(model, config, 100);
        let requests: Vec<_> = (20..24).map(|n| request(&long_running(n), 40)).collect();
        let mut readers: Vec<_> = requests.iter().map(|r| rig.submit(r.clone())).collect();
        rig.run();
        for (reader, request) in readers.iter_mut().zip(&requests) {
            assert_answer(reader, request);
        }
        assert!(rig.stats().preemptions_total > 0);
        rig.assert_clean();
    }
}

#[test]
fn a_context_only_request_is_not_computed_beyond_its_token() {
    let model = FakeModel::by_itself();
    let counts = Arc::clone(&model.counts);
    let mut rig = Rig::of(model, overlapping(), 100);
    let mut context = request(&long_running(5), 40);
    context.kind = RequestKind::ContextOnly {
        disagg_request_id: None,
        early: false,
    };
    let mut reader = rig.submit(context);
    rig.run();
    assert_eq!(reader.read().reason(), FinishReason::NotFinished);
    assert_eq!(counts.lock().expect("nobody panicked").begun, 1);
    let lease = reader.answer.ticket().expect("a ticket").ctx_request_id;
    rig.end_lease(lease, crate::handoff::LeaseEnd::Delivered);
    rig.run();
    rig.assert_clean();
}

#[test]
fn broken_logits_fail_their_request_only() {
    for mut model in models() {
        model.mishap = Some(fakes::Mishap::NanFor(9));
        model.steps_left = usize::MAX;
        let mut rig = Rig::of(model, overlapping(), 100);
        let good = request(&long_running(3), 12);
        let mut bad = rig.submit(request(&[9, 4], 6));
        let mut reader = rig.submit(good.clone());
        rig.run();
        assert_answer(&mut reader, &good);
        assert!(matches!(bad.read().failure(), RequestFailure::Engine(_)));
        rig.assert_clean();
    }
}

#[test]
fn a_stop_leaves_no_step_behind() {
    for model in models() {
        let mut rig = Rig::of(model, overlapping(), 100);
        let mut reader = rig.submit(request(&long_running(1), 40));
        for _ in 0..4 {
            rig.step();
        }
        assert!(rig.core.flight.is_some() && !rig.core.is_idle());
        rig.core.abort(&RequestFailure::ShuttingDown);
        assert_eq!(reader.read().failure(), &RequestFailure::ShuttingDown);
        assert!(rig.core.is_idle());
        rig.assert_clean();
    }
}
