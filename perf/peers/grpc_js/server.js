// The catalogue on grpc-js, in a cluster of node processes like the production server today. perf/peers/__init__.py
// describes what a peer receives and answers.
"use strict";
const cluster = require("cluster");
const crypto = require("crypto");
const fs = require("fs");
const grpc = require("@grpc/grpc-js");
const { Reader } = require("protobufjs/minimal");

const LENGTH_DELIMITED = 2;

// Every field of a message: its number, and its content if it is length-delimited.
function* fields(message) {
  const reader = Reader.create(message);
  while (reader.pos < reader.len) {
    const tag = reader.uint32();
    if ((tag & 7) === LENGTH_DELIMITED) yield [tag >>> 3, reader.bytes()];
    else reader.skipType(tag & 7);
  }
}

// CommandRequest.
function commandRequest(message) {
  const reader = Reader.create(message);
  let name = "";
  while (reader.pos < reader.len) {
    const tag = reader.uint32();
    if (tag >>> 3 === 1) name = reader.string();
    else reader.skipType(tag & 7);
  }
  return { name };
}

// `all` is a serialized CatalogResponse: every command is a slice of it.
function indexed(all) {
  const commands = new Map();
  for (const [number, content] of fields(all)) {
    if (number !== 1) continue;
    for (const [field, name] of fields(content)) {
      if (field === 1) commands.set(name.toString(), content);
      if (field === 1) break;
    }
  }
  return commands;
}

const failure = (code, details) => ({ code, details });

function serve() {
  const key = Buffer.from(process.env.PEER_KEY);
  const all = fs.readFileSync(process.env.PEER_CATALOGUE);
  const commands = indexed(all);

  function letIn(call) {
    const [presented] = call.metadata.get("x-avap-auth");
    const octets = Buffer.from(presented ?? "");
    return octets.length === key.length && crypto.timingSafeEqual(octets, key);
  }

  const guarded = (answer) => (call, callback) =>
    letIn(call)
      ? answer(call.request, callback)
      : callback(failure(grpc.status.UNAUTHENTICATED, "Invalid Credentials"));

  // Answers are encoded before the measurement.
  const method = (name, requestDeserialize) => ({
    path: `/avap.DefinitionEngine/${name}`,
    requestStream: false,
    responseStream: false,
    requestSerialize: (octets) => octets,
    requestDeserialize,
    responseSerialize: (octets) => octets,
    responseDeserialize: (octets) => octets,
  });

  const server = new grpc.Server();
  server.addService(
    { GetCommand: method("GetCommand", commandRequest), SyncCatalog: method("SyncCatalog", () => ({})) },
    {
      GetCommand: guarded(({ name }, callback) => {
        const found = commands.get(name);
        if (found) callback(null, found);
        else callback(failure(grpc.status.NOT_FOUND, `Command '${name}' not found`));
      }),
      SyncCatalog: guarded((_, callback) => callback(null, all)),
    },
  );
  const { PEER_TLS_CERT, PEER_TLS_KEY } = process.env;
  const credentials = PEER_TLS_CERT
    ? grpc.ServerCredentials.createSsl(null, [
        { cert_chain: fs.readFileSync(PEER_TLS_CERT), private_key: fs.readFileSync(PEER_TLS_KEY) },
      ])
    : grpc.ServerCredentials.createInsecure();
  server.bindAsync(`127.0.0.1:${process.env.PEER_PORT}`, credentials, (error) => {
    if (error) throw error;
    process.send("listening");
  });
}

function lead() {
  const workers = Number(process.env.PEER_WORKERS);
  let listening = 0;
  let ending = false;
  let left = workers;
  cluster.on("message", () => {
    listening += 1;
    if (listening === workers) console.log(process.env.PEER_PORT);
  });
  cluster.on("exit", (worker, code, signal) => {
    left -= 1;
    if (!ending) {
      console.error(`worker ${worker.process.pid} ended: ${signal ?? code}`);
      process.exit(1);
    }
    if (left === 0) process.exit(0);
  });
  for (let i = 0; i < workers; i++) cluster.fork();
  // When standard input ends, the process that started this one has ended.
  process.stdin.resume().on("end", () => {
    ending = true;
    for (const worker of Object.values(cluster.workers)) worker.process.kill("SIGKILL");
  });
}

if (cluster.isPrimary) lead();
else serve();
