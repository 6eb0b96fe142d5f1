//! Tests of the metadata-server file, its misspellings included.

use super::*;
use crate::section::Section;

fn outcome(text: &str) -> Result<MetadataConfig, String> {
    let document = Document::parse("metadata.yaml", text).expect("valid YAML");
    resolve(&document)
        .map(|(config, _)| config)
        .map_err(|errors| errors.to_string())
}

#[test]
fn both_spellings_and_a_missing_type_are_accepted() {
    assert_eq!(outcome("{}"), Ok(MetadataConfig::default()));
    for key in ["refresh_interval", "refersh_interval"] {
        let config = outcome(&format!(
            "hostname: h\nport: 1\nhealth_check_timeout: 2.5\n{key}: 3\n"
        ));
        let expected = MetadataConfig {
            server_type: MetadataServerType::Etcd,
            hostname: "h".to_owned(),
            port: 1,
            health_check_timeout: Duration::from_millis(2500),
            refresh_interval: Duration::from_secs(3),
        };
        assert_eq!(config, Ok(expected));
    }
}

#[test]
fn mistakes_are_all_named() {
    let message = outcome(
        "server_type: consul\nport: 0\nrefresh_interval: 1\nrefersh_interval: 1\nhost: x\n",
    );
    assert_eq!(
        message,
        Err("\
metadata.yaml:1:14: server_type: found text \"consul\", expected one of `etcd`
metadata.yaml:2:7: port: found 0, expected a whole number from 1 to 65535
metadata.yaml:4:1: refersh_interval: says the same as `refresh_interval`, give only one of them
metadata.yaml:5:1: host: unknown key `host`
  hint: known keys: `server_type`, `hostname`, `port`, `health_check_timeout`, `refresh_interval`, `refersh_interval`"
            .to_owned())
    );
}

#[test]
fn defaults_in_the_table_are_those_of_the_type() {
    let rows = RawMetadata::TABLE.rows();
    let text: String = rows
        .map(|row| format!("{}: {}\n", row.name, row.default))
        .collect();
    assert_eq!(outcome(&text), Ok(MetadataConfig::default()));
}
