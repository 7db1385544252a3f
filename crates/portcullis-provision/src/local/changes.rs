//! Asking a local instance's agent for changes, and keeping the record of the instance in step.
//!
//! May not live here: the questions (`client`).

use super::Instance;
use crate::Result;
use crate::ca::ClientCertificate;
use crate::client::{AgentClient, ClientError, blocking_with};

impl Instance {
    /// Asks its agent something, as the control plane. Pins its keys first, if they are not yet.
    ///
    /// # Errors
    /// When the agent does not answer, is not who was pinned, or refuses.
    pub fn ask<T: Send>(
        &mut self,
        certificate: &ClientCertificate,
        question: impl AsyncFnOnce(&AgentClient) -> Result<T, ClientError> + Send,
    ) -> Result<T> {
        self.pin()?;
        let client = self.client(Some(certificate))?;
        blocking_with(&client, question).map_err(|e| self.agent_error(e))
    }

    /// As [`Instance::ask`], for a change: the record then has the spec that the agent accepted. Secrets,
    /// which the agent does not show, stay as they are in the record.
    ///
    /// # Errors
    /// As [`Instance::ask`], and when the record can't be written.
    pub fn change<T: Send>(
        &mut self,
        certificate: &ClientCertificate,
        question: impl AsyncFnOnce(&AgentClient) -> Result<T, ClientError> + Send,
    ) -> Result<T> {
        let (answer, mut spec) = self.ask(certificate, async |client| {
            let answer = question(client).await?;
            Ok((answer, client.spec().await?))
        })?;
        spec.keep_secrets_of(&self.record.spec);
        if spec != self.record.spec {
            self.record.spec = spec;
            self.save()?;
        }
        Ok(answer)
    }

    /// Brings the record in step with the spec that the agent accepted, whoever changed it.
    pub(crate) fn refresh(&mut self, certificate: &ClientCertificate) -> Result<()> {
        self.change(certificate, async |_| Ok(()))
    }
}
