//! The platform's word on who the instance is, from its metadata service.
//!
//! The services speak plain HTTP on a link-local address that the platform answers itself. Nothing that they
//! say is trusted here: the receiver checks the platform's signature.
//! May not live here: which platform it is.

use std::time::Duration;

use portcullis_protocol::Secret;
use reqwest::{Client, RequestBuilder, Response, Url};
use serde::Deserialize;

use super::client::{bounded_body, describe};
use super::offer::Platform;
use super::token::{Token, jwt_life};

/// Where all three of them are (RFC 3927 link-local; the platforms' documentation).
const SERVICE: &str = "http://169.254.169.254";
/// Time for one question.
const TIME: Duration = Duration::from_secs(5);
/// Largest answer: documents have under 4 KiB, certificates with them a little more.
const MAX_ANSWER: usize = 32 << 10;
/// What does not say how long it lasts is asked for anew after this. An identity document lasts as long as the
/// instance; attested data for six hours.
const LIFE: Duration = Duration::from_secs(3600);

/// What the receiver gets in the `Authorization` header:
/// - EC2: `AWS-Instance-Identity`, the PKCS #7 message with the instance identity document
///   (`instance-identity/rsa2048`), base64.
/// - GCE: `Bearer`, the identity token for the audience.
/// - Azure: `Azure-Attested-Data`, the PKCS #7 message with the attested data, base64.
///
/// # Errors
/// A reason for the operator.
pub async fn identity(platform: Platform, audience: &str) -> Result<Token, String> {
    let client = Client::builder()
        .timeout(TIME)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .build()
        .map_err(|e| describe(&e))?;
    match platform {
        Platform::Aws => aws(&client).await,
        Platform::Gce => gce(&client, audience).await,
        Platform::Azure => azure(&client).await,
    }
}

/// IMDSv2 (EC2 user guide, "Use the Instance Metadata Service", "Instance identity documents").
async fn aws(client: &Client) -> Result<Token, String> {
    let session = client
        .put(format!("{SERVICE}/latest/api/token"))
        .header("X-aws-ec2-metadata-token-ttl-seconds", "60");
    let session = text(asked(session).await?).await?;
    let document = client
        .get(format!("{SERVICE}/latest/dynamic/instance-identity/rsa2048"))
        .header("X-aws-ec2-metadata-token", session.expose());
    let message = text(asked(document).await?).await?;
    Token::new("AWS-Instance-Identity", &unfolded(&message), LIFE).map_err(named)
}

/// Compute Engine documentation, "Verify the identity of VMs".
async fn gce(client: &Client, audience: &str) -> Result<Token, String> {
    let path = "/computeMetadata/v1/instance/service-accounts/default/identity";
    let mut url = Url::parse(SERVICE).map_err(|e| e.to_string())?;
    url.set_path(path);
    url.query_pairs_mut()
        .append_pair("audience", audience)
        .append_pair("format", "full");
    let answer = asked(client.get(url).header("Metadata-Flavor", "Google")).await?;
    // "Query metadata server responses": whatever lacks it is not the metadata server.
    if answer
        .headers()
        .get("metadata-flavor")
        .is_none_or(|flavor| flavor != "Google")
    {
        return Err(named("what answers is not Google's metadata server".to_owned()));
    }
    let token = text(answer).await?;
    let life = jwt_life(token.expose()).ok_or_else(|| named("the identity token is no JWT".to_owned()))?;
    Token::new("Bearer", &token, life).map_err(named)
}

/// Azure documentation, "Azure Instance Metadata Service", "Attested data".
async fn azure(client: &Client) -> Result<Token, String> {
    #[derive(Deserialize)]
    struct Attested {
        encoding: String,
        signature: Secret,
    }
    let question = client
        .get(format!(
            "{SERVICE}/metadata/attested/document?api-version=2020-09-01"
        ))
        .header("Metadata", "true");
    let answer = text(asked(question).await?).await?;
    let attested: Attested = serde_json::from_str(answer.expose())
        .map_err(|_| named("its answer is no attested data".to_owned()))?;
    if attested.encoding != "pkcs7" {
        return Err(named("the attested data is not in PKCS #7".to_owned()));
    }
    Token::new("Azure-Attested-Data", &unfolded(&attested.signature), LIFE).map_err(named)
}

async fn asked(question: RequestBuilder) -> Result<Response, String> {
    let answer = question.send().await.map_err(|e| named(describe(&e)))?;
    let status = answer.status();
    if status.is_success() {
        Ok(answer)
    } else {
        Err(named(format!("{} answered {status}", answer.url().path())))
    }
}

async fn text(answer: Response) -> Result<Secret, String> {
    let bytes = bounded_body(answer, MAX_ANSWER).await.map_err(named)?;
    let text = String::from_utf8(bytes).map_err(|_| named("its answer is no text".to_owned()))?;
    Ok(Secret::new(text.trim()))
}

/// Base64 without the line ends of PEM.
fn unfolded(base64: &Secret) -> Secret {
    let text: String = base64.expose().split_ascii_whitespace().collect();
    Secret::new(text)
}

fn named(reason: String) -> String {
    format!("the platform's metadata service: {reason}")
}
