//! The OpenAPI 3.1 document of the table in `routes`; schemas come from the types that are read and written.
//!
//! It is made by the tests and shipped as a file, so that the agent carries text and not what makes it.
//! May not live here: what can be asked.

use axum::http::StatusCode;
use portcullis_protocol::identity::{FirstContact, Identity};
use portcullis_protocol::spec::Name;
use portcullis_protocol::{AuthorizedKey, FirewallRule, Report, RuleId, Spec};
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::changes::{Changed, PeerBody};
use super::problem::Problem;
use super::routes::{IfMatch, OPERATIONS, Operation, Shape, Who};

const ETAG: &str = r#"^"[0-9]{1,19}"$"#;

/// The document.
fn document() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let mut paths = Map::new();
    for operation in OPERATIONS {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method.to_ascii_lowercase()] = described(operation, &mut generator);
    }
    let problem = reference::<Problem>(&mut generator);
    let schemas = generator.take_definitions(true);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "portcullis",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "Health and control of one instance",
            "description": "Changes are durable and enforced when their answer comes. The same change again is no \
                change and no error. Refusals are problem documents (RFC 9457).",
            "license": {"name": "Apache-2.0 OR MIT", "identifier": "Apache-2.0 OR MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {"problem": {
                "description": "It was refused, and nothing changed",
                "content": {"application/problem+json": {"schema": problem}},
            }},
            "securitySchemes": {"controlPlane": {
                "type": "mutualTLS",
                "description": "A client certificate of the authority in the spec's control_plane.client_ca",
            }},
        },
    })
}

fn described(operation: &Operation, generator: &mut SchemaGenerator) -> Value {
    let mut said = json!({
        "operationId": operation.id,
        "summary": operation.summary,
        "parameters": parameters(operation, generator),
        "responses": answers(operation, generator),
        "security": match operation.caller {
            Who::Anybody => json!([]),
            Who::ControlPlane => json!([{"controlPlane": []}]),
        },
    });
    if let Some((shape, example)) = operation.body {
        let example: Value = serde_json::from_str(example).unwrap();
        let (kind, schema) = form(shape, generator);
        said["requestBody"] = json!({
            "required": true,
            "content": {kind: {"schema": schema, "example": example}},
        });
    }
    said
}

fn parameters(operation: &Operation, generator: &mut SchemaGenerator) -> Vec<Value> {
    let mut parameters = Vec::new();
    if let Some((_, rest)) = operation.path.split_once('{') {
        let name = rest.split('}').next().unwrap();
        let schema = match name {
            "id" => reference::<RuleId>(generator),
            "instance" => reference::<Name>(generator),
            "fingerprint" => json!({"type": "string", "pattern": "^SHA256:[A-Za-z0-9+/]{43}$",
                "example": "SHA256:ioWt1wgLzcFiKEMHeMRvL3kvGv4ijTlZ1FEXNNIlfyY"}),
            "generation" => json!({"type": "integer", "minimum": 0, "maximum": u64::MAX}),
            other => panic!("{other}: say what it is"),
        };
        parameters.push(json!({"name": name, "in": "path", "required": true, "schema": schema}));
    }
    for parameter in operation.query {
        let mut schema: Value = serde_json::from_str(parameter.schema).unwrap();
        let mut said = json!({
            "name": parameter.name,
            "in": "query",
            "description": parameter.summary,
            "required": parameter.required,
        });
        if let Some(example) = schema.as_object_mut().unwrap().remove("example") {
            said["example"] = example;
        }
        said["schema"] = schema;
        parameters.push(said);
    }
    if operation.if_match != IfMatch::Unused {
        parameters.push(json!({
            "name": "If-Match",
            "in": "header",
            "description": "The generation that the caller knows, as ETag gave it, or *",
            "required": operation.if_match == IfMatch::Required,
            "schema": {"type": "string", "minLength": 1, "pattern": r#"^("[0-9]{1,19}"|[*])$"#},
            "example": "*",
        }));
    }
    parameters
}

fn answers(operation: &Operation, generator: &mut SchemaGenerator) -> Value {
    let mut done = json!({"description": "Done"});
    if operation.answer != Shape::Nothing {
        let (kind, schema) = form(operation.answer, generator);
        done["content"] = json!({kind: {"schema": schema}});
    }
    if matches!(operation.answer, Shape::Spec | Shape::Changed) {
        done["headers"] = json!({"ETag": {
            "description": "The generation, for If-Match",
            "required": true,
            "schema": {"type": "string", "pattern": ETAG},
        }});
    }
    let mut answers = Map::new();
    if let Some(status) = operation.unready {
        let mut unready = done.clone();
        unready["description"] = json!("Not ready");
        answers.insert(status.as_str().to_owned(), unready);
    }
    let status = match operation.answer {
        Shape::Nothing => StatusCode::NO_CONTENT,
        _ => StatusCode::OK,
    };
    answers.insert(status.as_str().to_owned(), done);
    let mut problems = operation.problems.to_vec();
    problems.push(StatusCode::TOO_MANY_REQUESTS);
    if operation.caller == Who::ControlPlane {
        problems.push(StatusCode::FORBIDDEN);
    }
    if operation.if_match != IfMatch::Unused || !operation.query.is_empty() {
        problems.push(StatusCode::BAD_REQUEST);
    }
    if operation.if_match != IfMatch::Unused {
        problems.push(StatusCode::PRECONDITION_FAILED);
    }
    if operation.if_match == IfMatch::Required {
        problems.push(StatusCode::PRECONDITION_REQUIRED);
    }
    if operation.path.contains('{') {
        problems.extend([StatusCode::BAD_REQUEST, StatusCode::NOT_FOUND]);
    }
    if operation.body.is_some() {
        problems.extend([
            StatusCode::BAD_REQUEST,
            StatusCode::REQUEST_TIMEOUT,
            StatusCode::PAYLOAD_TOO_LARGE,
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            StatusCode::UNPROCESSABLE_ENTITY,
        ]);
    }
    for status in problems {
        let problem = json!({"$ref": "#/components/responses/problem"});
        answers.entry(status.as_str()).or_insert(problem);
    }
    Value::Object(answers)
}

/// The media type and the schema.
fn form(shape: Shape, generator: &mut SchemaGenerator) -> (&'static str, Value) {
    let schema = match shape {
        Shape::Text | Shape::Nothing => return ("text/plain", json!({"type": "string"})),
        Shape::Metrics => return ("application/openmetrics-text", json!({"type": "string"})),
        Shape::Report => reference::<Report>(generator),
        Shape::Identity => reference::<Identity>(generator),
        Shape::FirstContact => reference::<FirstContact>(generator),
        Shape::Spec => reference::<Spec>(generator),
        Shape::Rule => reference::<FirewallRule>(generator),
        Shape::Peer => reference::<PeerBody>(generator),
        Shape::Key => reference::<AuthorizedKey>(generator),
        Shape::Changed => reference::<Changed>(generator),
        Shape::OpenApi => json!({"type": "object", "required": ["openapi", "info", "paths"]}),
    };
    ("application/json", schema)
}

fn reference<T: JsonSchema>(generator: &mut SchemaGenerator) -> Value {
    generator.subschema_for::<T>().to_value()
}

/// The file that ships is what the table says. Set `UPDATE_SCHEMA=1` to write it anew.
#[test]
fn the_shipped_description_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/schema/openapi.json");
    let text = serde_json::to_string_pretty(&document()).unwrap() + "\n";
    if std::env::var_os("UPDATE_SCHEMA").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    assert_eq!(
        std::fs::read_to_string(path).unwrap(),
        text,
        "{path}: run `make schema`"
    );
}

/// Who adds a path adds it to the table, or nobody is told of it.
#[test]
fn paths_are_in_the_table_alone() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/health");
    let call = concat!(".ro", "ute(");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        let expected = usize::from(path.ends_with("routes.rs"));
        assert_eq!(text.matches(call).count(), expected, "{}", path.display());
    }
    let mut ids: Vec<&str> = OPERATIONS.iter().map(|operation| operation.id).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), OPERATIONS.len());
}
