// Reads a catalogue with grpc-js and prints what it got as JSON: node catalogue.js HOST:PORT KEY DESCRIPTORS CALLS.
// DESCRIPTORS is a file with the serialized FileDescriptorSet of avap.proto.
"use strict";
const fs = require("fs");
const util = require("util");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [target, key, descriptors, calls] = process.argv.slice(2);
const options = { keepCase: true, defaults: true, bytes: Buffer };
const loaded = loader.loadFileDescriptorSetFromBuffer(fs.readFileSync(descriptors), options);
const { DefinitionEngine } = grpc.loadPackageDefinition(loaded).avap;
const client = new DefinitionEngine(target, grpc.credentials.createInsecure(), {
  "grpc.max_receive_message_length": -1,
});

// One call with a deadline of its own.
function call(method, request, presented) {
  const metadata = new grpc.Metadata();
  metadata.set("x-avap-auth", presented);
  const deadline = new Date(Date.now() + 30000);
  return new Promise((resolve, reject) =>
    client[method](request, metadata, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer))),
  );
}

const failure = (name, presented) =>
  call("GetCommand", { name }, presented).then(
    () => "the call succeeded",
    ({ code, details }) => ({ code, details }),
  );
const plain = (command) => ({ ...command, code: command.code.toString("base64") });

(async () => {
  const catalogue = await call("SyncCatalog", {}, key);
  let equal = 0;
  for (let i = 0; i < Number(calls); i++) {
    const wanted = catalogue.commands[i % catalogue.commands.length];
    if (util.isDeepStrictEqual(await call("GetCommand", { name: wanted.name }, key), wanted)) equal++;
  }
  console.log(
    JSON.stringify({
      catalogue: { ...catalogue, commands: catalogue.commands.map(plain) },
      equal,
      missing: await failure("nichts / 無", key),
      refused: await failure("if", "wrong"),
    }),
  );
  client.close();
})();
