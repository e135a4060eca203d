//! The catalogue on tonic. `perf/peers/__init__.py` describes what a peer receives and answers.

use std::{
    collections::HashMap,
    convert::Infallible,
    env,
    error::Error,
    fs,
    io::Read,
    marker::PhantomData,
    sync::Arc,
    task::{Context, Poll},
    thread,
};

use bytes::{Buf, BufMut, Bytes};
use prost::{
    Message,
    encoding::{decode_key, decode_varint},
};
use subtle::ConstantTimeEq;
use tokio::{net::TcpListener, runtime::Builder};
use tonic::{
    Request, Response, Status,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::{BoxFuture, Service},
    metadata::MetadataMap,
    server::{Grpc, NamedService, UnaryService},
    transport::{Identity, Server, ServerTlsConfig, server::TcpIncoming},
};

type Failure = Box<dyn Error + Send + Sync>;

#[derive(Clone, PartialEq, prost::Message)]
struct CommandRequest {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Empty {}

/// The position of an answer in the catalogue.
#[derive(Clone, PartialEq, prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

/// Answers are encoded before the measurement; requests are decoded as in generated code.
struct Encoded<A>(PhantomData<A>);

struct Raw;

struct Prost<A>(PhantomData<A>);

impl<A: Message + Default + Send + 'static> Codec for Encoded<A> {
    type Encode = Bytes;
    type Decode = A;
    type Encoder = Raw;
    type Decoder = Prost<A>;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Prost<A> {
        Prost(PhantomData)
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, target: &mut EncodeBuf<'_>) -> Result<(), Status> {
        target.put(item);
        Ok(())
    }
}

impl<A: Message + Default> Decoder for Prost<A> {
    type Item = A;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<A>, Status> {
        A::decode(source)
            .map(Some)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

struct Catalogue {
    key: Vec<u8>,
    all: Bytes,
    commands: HashMap<String, Bytes>,
}

impl Catalogue {
    /// `all` is a serialized CatalogResponse: every command is a slice of it.
    fn new(key: Vec<u8>, all: Bytes) -> Result<Self, Failure> {
        let mut commands = HashMap::new();
        let mut rest = all.clone();
        while rest.has_remaining() {
            match decode_key(&mut rest)? {
                (1, _) => {
                    let length = decode_varint(&mut rest)? as usize;
                    let command = rest.split_to(length);
                    commands.insert(Named::decode(command.clone())?.name, command);
                }
                (2, _) => {
                    decode_varint(&mut rest)?;
                }
                _ => {
                    let length = decode_varint(&mut rest)? as usize;
                    rest.advance(length);
                }
            }
        }
        Ok(Self { key, all, commands })
    }

    fn let_in(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let presented = metadata
            .get("x-avap-auth")
            .map_or(&b""[..], |value| value.as_bytes());
        if bool::from(presented.ct_eq(&self.key)) {
            return Ok(());
        }
        Err(Status::unauthenticated("Invalid Credentials"))
    }
}

#[derive(Clone)]
struct One(Arc<Catalogue>);

impl UnaryService<CommandRequest> for One {
    type Response = Bytes;
    type Future = BoxFuture<Response<Bytes>, Status>;

    fn call(&mut self, request: Request<CommandRequest>) -> Self::Future {
        let catalogue = Arc::clone(&self.0);
        Box::pin(async move {
            catalogue.let_in(request.metadata())?;
            let name = &request.get_ref().name;
            match catalogue.commands.get(name) {
                Some(answer) => Ok(Response::new(answer.clone())),
                None => Err(Status::not_found(format!("Command '{name}' not found"))),
            }
        })
    }
}

#[derive(Clone)]
struct All(Arc<Catalogue>);

impl UnaryService<Empty> for All {
    type Response = Bytes;
    type Future = BoxFuture<Response<Bytes>, Status>;

    fn call(&mut self, request: Request<Empty>) -> Self::Future {
        let catalogue = Arc::clone(&self.0);
        Box::pin(async move {
            catalogue.let_in(request.metadata())?;
            Ok(Response::new(catalogue.all.clone()))
        })
    }
}

/// The code that tonic-build would generate for the service.
#[derive(Clone)]
struct Engine(Arc<Catalogue>);

impl NamedService for Engine {
    const NAME: &'static str = "avap.DefinitionEngine";
}

impl Service<http::Request<Body>> for Engine {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let catalogue = Arc::clone(&self.0);
        match request.uri().path() {
            "/avap.DefinitionEngine/GetCommand" => Box::pin(async move {
                let codec = Encoded(PhantomData);
                Ok(Grpc::new(codec).unary(One(catalogue), request).await)
            }),
            "/avap.DefinitionEngine/SyncCatalog" => Box::pin(async move {
                let codec = Encoded(PhantomData);
                Ok(Grpc::new(codec).unary(All(catalogue), request).await)
            }),
            _ => Box::pin(async { Ok(Status::unimplemented("").into_http()) }),
        }
    }
}

async fn serve(catalogue: Catalogue) -> Result<(), Failure> {
    let mut server = Server::builder();
    if let (Ok(certificate), Ok(key)) = (env::var("PEER_TLS_CERT"), env::var("PEER_TLS_KEY")) {
        let identity = Identity::from_pem(fs::read(certificate)?, fs::read(key)?);
        server = server.tls_config(ServerTlsConfig::new().identity(identity))?;
    }
    let port = env::var("PEER_PORT")?;
    let listener = TcpListener::bind(format!("127.0.0.1:{port}")).await?;
    println!("{port}");
    // tonic does the same when it binds the port itself.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    server
        .add_service(Engine(Arc::new(catalogue)))
        .serve_with_incoming(incoming)
        .await?;
    Ok(())
}

fn main() -> Result<(), Failure> {
    // When standard input ends, the process that started this one has ended.
    thread::spawn(|| {
        let mut octets = [0; 64];
        while matches!(std::io::stdin().read(&mut octets), Ok(read) if read > 0) {}
        std::process::exit(0);
    });
    let workers: usize = env::var("PEER_WORKERS")?.parse()?;
    let key = env::var("PEER_KEY")?.into_bytes();
    let catalogue = Catalogue::new(key, fs::read(env::var("PEER_CATALOGUE")?)?.into())?;
    let mut runtime = match workers {
        1 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    if workers > 1 {
        runtime.worker_threads(workers);
    }
    runtime.enable_all().build()?.block_on(serve(catalogue))
}
