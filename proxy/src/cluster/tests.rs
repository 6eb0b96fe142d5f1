//! Tests of readiness, of choosing, and of workers that come and go.

use baton_configs::cluster::ClusterConfig;

use super::*;
use crate::workers::Condition;

fn endpoint(port: u16) -> Endpoint {
    Endpoint {
        host: "127.0.0.1".to_owned(),
        port,
    }
}

fn config(context: &[u16], generation: &[u16]) -> DisaggConfig {
    let group = |ports: &[u16]| ServerGroup {
        servers: ports.iter().map(|port| endpoint(*port).into()).collect(),
        ..ServerGroup::default()
    };
    DisaggConfig {
        context_servers: group(context),
        generation_servers: group(generation),
        ..DisaggConfig::default()
    }
}

fn cluster(context: &[u16], generation: &[u16]) -> Cluster {
    Cluster::new(&config(context, generation))
}

fn discovering(context_min: u32, generation_min: u32) -> Cluster {
    Cluster::new(&DisaggConfig {
        cluster: Some(ClusterConfig {
            store: endpoint(8000),
            name: String::new(),
            context_servers_min: context_min,
            generation_servers_min: generation_min,
            heartbeat_interval: std::time::Duration::from_secs(5),
            inactive_timeout: std::time::Duration::from_secs(10),
        }),
        ..DisaggConfig::default()
    })
}

fn refused() -> Condition {
    Condition::Unreachable("connection refused".to_owned())
}

#[test]
fn readiness_needs_all_at_first_and_one_of_each_role_later() {
    let cluster = cluster(&[1, 2], &[3]);
    let all: Vec<_> = cluster.workers().collect();
    for worker in &all {
        worker.report(Condition::Up);
    }
    assert!(cluster.readiness().is_err(), "start-up is not over");
    cluster.set_started();
    assert_eq!(cluster.readiness(), Ok(()));
    all[0].report(refused());
    assert_eq!(cluster.readiness(), Ok(()));
    all[2].report(Condition::NotReady("answered 503: engine down".to_owned()));
    assert_eq!(
        cluster.readiness(),
        Err("no generation server is up: 127.0.0.1:3 (answered 503: engine down)".to_owned())
    );
}

#[test]
fn round_robin_skips_the_down_and_the_excluded() {
    let cluster = cluster(&[1, 2, 3], &[4]);
    let all = cluster.group(Role::Context).servers().to_vec();
    assert!(cluster.group(Role::Context).choose(&[]).is_none());
    for worker in &all {
        worker.report(Condition::Up);
    }
    let ports = |excluded: &[Arc<Worker>]| -> Vec<u16> {
        (0..4)
            .filter_map(|_| cluster.group(Role::Context).choose(excluded))
            .map(|worker| worker.endpoint().port)
            .collect()
    };
    assert_eq!(ports(&[]), [1, 2, 3, 1]);
    all[1].report(Condition::Silent("no answer".to_owned()));
    assert!(!ports(&[]).contains(&2));
    let rest = ports(std::slice::from_ref(&all[0]));
    assert!(rest.iter().all(|port| *port == 3));
    assert!(ports(&[all[0].clone(), all[2].clone()]).is_empty());
}

#[test]
fn only_changes_of_kind_are_news() {
    let cluster = cluster(&[1], &[2]);
    let worker = cluster.workers().next().unwrap();
    assert!(worker.report(Condition::NotReady("loading 1 %".to_owned())));
    assert!(!worker.report(Condition::NotReady("loading 2 %".to_owned())));
    assert_eq!(worker.condition().to_string(), "loading 2 %");
    assert!(worker.report(Condition::Up));
}

#[test]
fn with_discovery_the_minimum_of_each_role_decides() {
    let cluster = discovering(2, 1);
    let text = "0 of at least 2 context servers are up: no context server has registered; \
                no generation server is up: no generation server has registered";
    assert_eq!(cluster.readiness(), Err(text.to_owned()));
    let add = |role, port: u16| {
        let worker = cluster.add(role, endpoint(port), Origin::Registered(port.to_string()));
        worker.report(Condition::Up);
        worker
    };
    let first = add(Role::Context, 1);
    add(Role::Generation, 3);
    cluster.set_sightings("2 workers are in cluster \"x\"".to_owned());
    let text = "1 of at least 2 context servers are up: no other context server has registered; \
                2 workers are in cluster \"x\"";
    assert_eq!(cluster.readiness(), Err(text.to_owned()));
    let second = add(Role::Context, 2);
    assert_eq!(cluster.readiness(), Ok(()));
    second.report(refused());
    assert!(
        cluster
            .readiness()
            .unwrap_err()
            .contains("127.0.0.1:2 (connection refused)")
    );
    cluster.remove(&second);
    assert_eq!(cluster.group(Role::Context).servers().len(), 1);
    assert_eq!(first.id(), "1");
}

#[test]
fn who_has_left_is_not_chosen_even_if_it_answers_once_more() {
    let cluster = discovering(0, 0);
    let worker = cluster.add(
        Role::Context,
        endpoint(1),
        Origin::Registered("a".to_owned()),
    );
    worker.report(Condition::Up);
    assert!(cluster.group(Role::Context).has_choice(&[]));
    cluster.remove(&worker);
    worker.report(Condition::Up);
    assert!(!worker.is_up());
    assert!(!cluster.group(Role::Context).has_choice(&[]));
}

#[test]
fn an_address_file_is_waited_for() {
    let file = ServerAddress::File("/run/ctx0".into());
    let mut config = config(&[], &[3]);
    config.context_servers.servers = vec![file.clone()];
    let cluster = Cluster::new(&config);
    cluster.workers().next().unwrap().report(Condition::Up);
    cluster.set_unfound(Role::Context, &file, "not there yet");
    assert_eq!(
        cluster.readiness(),
        Err("starting, waiting for context server file:/run/ctx0: not there yet".to_owned())
    );
    cluster.set_found(Role::Context, &file);
    let worker = cluster.add(Role::Context, endpoint(1), Origin::Configured);
    assert_eq!(cluster.missing()[0].name, "context server 127.0.0.1:1");
    worker.report(Condition::Up);
    assert_eq!(cluster.missing(), []);
}
