//! Generation servers hear of context servers as soon as both are up.

use serde_json::json;

use crate::harness::{Running, options, prompt};
use crate::mock::{Mock, Script, ticket, written};

fn endpoint(name: &str) -> Script {
    Script::json(200, &json!({"encoded_opaque_state": name}))
}

#[tokio::test]
async fn everybody_meets_everybody_before_the_first_request() {
    let context = [Mock::start(ticket).await, Mock::start(ticket).await];
    let generation = [Mock::start(written).await, Mock::start(written).await];
    for (mock, name) in context.iter().zip(["first", "second"]) {
        mock.set_kv_endpoint(endpoint(name));
    }
    // One of them does not know what it is asked.
    generation[0].set_kv_peers(Script::text(200, "text/plain", ""));
    let givers = context.each_ref().map(|mock| mock.address);
    let takers = generation.each_ref().map(|mock| mock.address);
    let proxy = Running::ready(options(&givers, &takers)).await;
    for mock in &generation {
        let mut told: Vec<_> = mock.wait_peers(2).await;
        told.sort();
        let expected = ["first", "second"].map(|name| json!({"encoded_opaque_state": name}));
        assert_eq!(told, expected.map(|value| value.to_string()));
    }
    assert!(
        context
            .iter()
            .chain(&generation)
            .all(|mock| mock.seen().is_empty())
    );
    assert_eq!(proxy.complete(prompt()).await.status, 200);
}

#[tokio::test]
async fn a_server_that_comes_back_is_introduced_again() {
    let context = Mock::start(ticket).await;
    context.set_kv_endpoint(endpoint("before"));
    let generation = Mock::start(written).await;
    let proxy = Running::ready(options(&[context.address], &[generation.address])).await;
    assert_eq!(generation.wait_peers(1).await.len(), 1);
    let address = context.kill().await;
    proxy.wait_health(503).await;
    let context = Mock::start_at(address, ticket).await;
    context.set_kv_endpoint(endpoint("after"));
    let told = generation.wait_peers(2).await;
    assert_eq!(
        told[1],
        json!({"encoded_opaque_state": "after"}).to_string()
    );
}

#[tokio::test]
async fn a_context_server_that_does_not_say_is_nobodys_peer() {
    let (context, silent) = (Mock::start(ticket).await, Mock::start(ticket).await);
    context.set_kv_endpoint(endpoint("one"));
    let generation = Mock::start(written).await;
    let givers = [silent.address, context.address];
    let proxy = Running::ready(options(&givers, &[generation.address])).await;
    assert_eq!(generation.wait_peers(1).await.len(), 1);
    assert_eq!(proxy.complete(prompt()).await.status, 200);
    assert_eq!(generation.wait_peers(1).await.len(), 1);
}
