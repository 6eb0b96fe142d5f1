//! The real thread: answers, shutdown, errors and panics. Every wait has a deadline.

use std::time::{Duration, Instant};

use super::*;
use crate::handoff::{HandoffEvent, LeaseEnd};
use crate::request::SubmitError;
use fakes::Mishap;

const PATIENCE: Duration = Duration::from_secs(20);

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

fn start(model: FakeModel, config: EngineConfig) -> (EngineHandle, EngineThread, Wire) {
    let wire = Wire::default();
    let handoff = Box::new(FakeHandoff(wire.clone()));
    let inbox = Inbox::new(100);
    let (handle, thread) =
        Engine::start(Box::new(model), Some(handoff), config, inbox).expect("starts");
    (handle, thread, wire)
}

async fn read(stream: &mut RequestStream) -> Answer {
    let mut answer = Answer::default();
    while let Some(event) = tokio::time::timeout(PATIENCE, stream.next())
        .await
        .expect("the engine answers in time")
    {
        answer.take(event);
    }
    answer
}

#[tokio::test]
async fn a_thread_answers_many_at_once_and_ends_when_told() {
    let (handle, thread, _) = start(FakeModel::new(), small_config());
    let requests: Vec<_> = (1..20).map(|n| request(&[n, n + 1, 7], 20)).collect();
    let mut streams = Vec::new();
    for request in &requests {
        streams.push(handle.submit(request.clone()).expect("room"));
    }
    for (stream, request) in streams.iter_mut().zip(&requests) {
        let answer = read(stream).await;
        assert_eq!(answer.tokens, closed_form(request, 64).0);
    }
    assert!(handle.is_alive());
    assert_eq!(handle.stats().requests_finished_total, 19);
    assert_eq!(handle.stats().blocks_used, 0);
    handle.shutdown(soon());
    thread.join(soon()).expect("a clean end");
    assert!(!handle.is_alive());
    let refused = handle.submit(request(&[1], 1)).expect_err("over");
    assert_eq!(refused, SubmitError::Stopped);
}

#[tokio::test]
async fn a_device_error_fails_everybody_and_ends_the_thread() {
    for mishap in [Mishap::Error, Mishap::Panic] {
        let mut model = FakeModel::new();
        model.mishap = Some(mishap);
        model.steps_left = 5;
        let (handle, thread, _) = start(model, small_config());
        // On a busy machine the end may come before the last of them.
        let mut streams: Vec<_> = (0..8)
            .map_while(|n| handle.submit(request(&long_running(n), 40)).ok())
            .collect();
        assert!(!streams.is_empty());
        for stream in &mut streams {
            let answer = read(stream).await;
            assert!(
                matches!(answer.end, Some(End::Failed(RequestFailure::Engine(_)))),
                "{:?}",
                answer.end
            );
        }
        assert!(!handle.is_alive());
        match thread.join(soon()).expect_err("a broken end") {
            EngineError::Device(_) => assert_eq!(mishap, Mishap::Error),
            EngineError::Panicked(text) => {
                assert_eq!(mishap, Mishap::Panic);
                assert!(text.contains("on purpose"), "{text}");
            }
            other => panic!("{other}"),
        }
        assert!(handle.submit(request(&[1], 1)).is_err());
    }
}

#[tokio::test]
async fn a_drain_finishes_what_runs_and_fails_what_waits() {
    let config = EngineConfig {
        max_batch_size: 1,
        ..small_config()
    };
    let (handle, thread, _) = start(FakeModel::new(), config);
    let running = request(&long_running(5), 40);
    let mut first = handle.submit(running.clone()).expect("room");
    let mut answer = Answer::default();
    let event = tokio::time::timeout(PATIENCE, first.next()).await;
    answer.take(event.expect("in time").expect("a token"));
    let mut others: Vec<_> = (0..20)
        .map(|n| handle.submit(request(&long_running(n), 40)).expect("room"))
        .collect();
    handle.shutdown(soon());
    let rest = read(&mut first).await;
    answer.tokens.extend(rest.tokens);
    assert_eq!(answer.tokens, closed_form(&running, 64).0);
    let mut failed = 0;
    for other in &mut others {
        match read(other).await.end {
            Some(End::Failed(RequestFailure::ShuttingDown)) => failed += 1,
            Some(End::Finished(FinishReason::Length, ..)) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(failed > 0, "one place cannot have served all twenty");
    thread.join(soon()).expect("a clean end");
}

#[tokio::test]
async fn a_drain_waits_for_leases_and_no_longer_than_its_deadline() {
    for delivered in [true, false] {
        let wire = Wire::default();
        let handoff = Box::new(FakeHandoff(wire.clone()));
        let inbox = Inbox::new(10);
        let sink = inbox.handoff_sink();
        let (handle, thread) = Engine::start(
            Box::new(FakeModel::new()),
            Some(handoff),
            small_config(),
            inbox,
        )
        .expect("starts");
        let mut context = request(&long_running(5), 40);
        context.kind = RequestKind::ContextOnly {
            disagg_request_id: None,
            early: false,
        };
        let mut stream = handle.submit(context).expect("room");
        let answer = read(&mut stream).await;
        let ctx_request_id = answer.ticket().expect("a lease").ctx_request_id;
        if delivered {
            handle.shutdown(soon());
            sink(HandoffEvent::LeaseEnded {
                ctx_request_id,
                end: LeaseEnd::Delivered,
            });
        } else {
            handle.shutdown(Instant::now());
        }
        thread.join(soon()).expect("a clean end");
        let withdrawn = wire.lock().withdrawn.contains(&ctx_request_id);
        assert_eq!(withdrawn, !delivered);
    }
}

#[tokio::test]
async fn dropping_the_thread_ends_it() {
    let (handle, thread, wire) = start(FakeModel::new(), small_config());
    let mut half = hands::generation_half(&request(&long_running(5), 40), 64);
    half.cache_salt = Some("x".to_owned());
    let mut stream = handle.submit(half).expect("room");
    drop(thread);
    let answer = read(&mut stream).await;
    assert_eq!(answer.end, Some(End::Failed(RequestFailure::ShuttingDown)));
    let begun = wire.lock().fetches.len();
    assert_eq!(wire.lock().cancelled.len(), begun);
}

#[test]
fn an_engine_that_cannot_work_does_not_start() {
    let start = |config| Engine::start(Box::new(FakeModel::new()), None, config, Inbox::new(1));
    let error = start(EngineConfig {
        tokens_per_block: 0,
        ..small_config()
    });
    let text = error.expect_err("no blocks").to_string();
    assert_eq!(
        text,
        "engine option `tokens_per_block` is 0, must be at least 1"
    );
    let (handle, thread) = start(small_config()).expect("starts");
    let mut half = request(&[1], 4);
    half.kind = RequestKind::ContextOnly {
        disagg_request_id: None,
        early: false,
    };
    let Err(SubmitError::Unservable(text)) = handle.submit(half) else {
        panic!("there is no transceiver");
    };
    assert!(text.contains("cache_transceiver_config"));
    handle.shutdown(Instant::now());
    thread.join(soon()).expect("a clean end");
}

#[tokio::test]
async fn pages_that_a_lost_rank_has_a_part_of_end_the_engine() {
    let mut model = FakeModel::new();
    model.mishap = Some(Mishap::Pages);
    let (handle, thread, _) = start(model, small_config());
    let context_only = GenerateRequest {
        kind: RequestKind::ContextOnly {
            disagg_request_id: Some(1),
            early: false,
        },
        ..request(&long_running(11), 10)
    };
    let mut stream = handle.submit(context_only).expect("room");
    let answer = read(&mut stream).await;
    let RequestFailure::Handoff(text) = answer.failure() else {
        panic!("{:?}", answer.failure());
    };
    assert!(text.contains("rank 1: lost on purpose"), "{text}");
    let error = thread.join(soon()).expect_err("it cannot go on");
    assert!(matches!(error, EngineError::Rank(_)), "{error}");

    let mut model = FakeModel::new();
    model.mishap = Some(Mishap::Pages);
    let (wire, inbox) = (Wire::default(), Inbox::new(100));
    let sink = inbox.handoff_sink();
    let handoff = Box::new(FakeHandoff(wire.clone()));
    let (handle, thread) =
        Engine::start(Box::new(model), Some(handoff), small_config(), inbox).expect("starts");
    let whole = request(&long_running(11), 10);
    let half = hands::generation_half(&whole, 64);
    let mut stream = handle.submit(half).expect("room");
    let fetch = loop {
        let id = wire.lock().fetches.keys().next().copied();
        match id.and_then(|id| wire.take_fetch(id)) {
            Some(fetch) => break fetch,
            None => tokio::task::yield_now().await,
        }
    };
    sink(HandoffEvent::PagesReturned { pages: fetch.pages });
    let answer = read(&mut stream).await;
    assert!(matches!(answer.failure(), RequestFailure::Engine(_)));
    let error = thread.join(soon()).expect_err("it cannot go on");
    assert!(matches!(error, EngineError::Rank(_)), "{error}");
}
