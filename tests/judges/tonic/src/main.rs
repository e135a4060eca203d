//! Reads a catalogue with tonic and prints what it got as JSON: `catalogue HOST:PORT KEY DESCRIPTORS CALLS`. The
//! messages are written out here, so DESCRIPTORS, which the other clients need, is not read.

use std::{env, error::Error, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tonic::{
    Request, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, prost::Message)]
struct CommandRequest {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CommandResponse {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    r#type: String,
    #[prost(string, tag = "3")]
    interface_json: String,
    #[prost(bytes = "vec", tag = "4")]
    code: Vec<u8>,
    #[prost(string, tag = "5")]
    hash: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CatalogResponse {
    #[prost(message, repeated, tag = "1")]
    commands: Vec<CommandResponse>,
    #[prost(int32, tag = "2")]
    total_count: i32,
    #[prost(string, tag = "3")]
    version_hash: String,
}

struct Client(Grpc<Channel>);

impl Client {
    /// One call with a deadline of its own.
    async fn call<A, B>(&mut self, method: &'static str, message: A, key: &str) -> Result<B, Status>
    where
        A: prost::Message + Send + Sync + 'static,
        B: prost::Message + Default + Send + Sync + 'static,
    {
        let mut request = Request::new(message);
        request.set_timeout(Duration::from_secs(30));
        request.metadata_mut().insert(
            "x-avap-auth",
            key.parse().map_err(|_| Status::internal("bad key"))?,
        );
        self.0
            .ready()
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let codec = ProstCodec::<A, B>::default();
        Ok(self
            .0
            .unary(request, PathAndQuery::from_static(method), codec)
            .await?
            .into_inner())
    }

    async fn get(&mut self, name: &str, key: &str) -> Result<CommandResponse, Status> {
        self.call(
            "/avap.DefinitionEngine/GetCommand",
            CommandRequest { name: name.into() },
            key,
        )
        .await
    }

    async fn failure(&mut self, name: &str, key: &str) -> Value {
        match self.get(name, key).await {
            Ok(_) => json!("the call succeeded"),
            Err(status) => json!({"code": status.code() as i32, "details": status.message()}),
        }
    }
}

fn plain(command: &CommandResponse) -> Value {
    json!({
        "name": command.name, "type": command.r#type, "interface_json": command.interface_json,
        "code": BASE64_STANDARD.encode(&command.code), "hash": command.hash,
    })
}

async fn read(target: &str, key: &str, calls: usize) -> Result<Value, Box<dyn Error>> {
    let channel = Endpoint::from_shared(format!("http://{target}"))?
        .connect()
        .await?;
    let mut client = Client(Grpc::new(channel).max_decoding_message_size(1 << 30));
    let catalogue: CatalogResponse = client
        .call("/avap.DefinitionEngine/SyncCatalog", (), key)
        .await?;
    let mut equal = 0;
    for wanted in catalogue.commands.iter().cycle().take(calls) {
        equal += usize::from(client.get(&wanted.name, key).await? == *wanted);
    }
    let commands: Vec<Value> = catalogue.commands.iter().map(plain).collect();
    Ok(json!({
        "catalogue": {
            "commands": commands, "total_count": catalogue.total_count, "version_hash": catalogue.version_hash,
        },
        "equal": equal,
        "missing": client.failure("nichts / 無", key).await,
        "refused": client.failure("if", "wrong").await,
    }))
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let answers = runtime.block_on(read(&arguments[1], &arguments[2], arguments[4].parse()?))?;
    println!("{answers}");
    Ok(())
}
