// Reads a catalogue as today's language servers do, and prints the answers as one JSON document.
// Usage: node read_catalogue.js PORT KEY PROTO
"use strict";
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [port, key, proto] = process.argv.slice(2);
const loaded = loader.loadSync(proto, { keepCase: true, defaults: true, bytes: Buffer });
const { DefinitionEngine } = grpc.loadPackageDefinition(loaded).avap;
const client = new DefinitionEngine(`127.0.0.1:${port}`, grpc.credentials.createInsecure(), {
  "grpc.max_receive_message_length": -1,
});

function call(method, request, presented) {
  const metadata = new grpc.Metadata();
  if (presented !== undefined) metadata.set("x-avap-auth", presented);
  const deadline = new Date(Date.now() + 30000);
  return new Promise((resolve) =>
    client[method](request, metadata, { deadline }, (error, answer) =>
      resolve(error ? { code: error.code, details: error.details } : answer),
    ),
  );
}

const plain = (command) => ({ ...command, code: command.code.toString("base64") });

(async () => {
  const catalogue = await call("SyncCatalog", {}, key);
  const single = [];
  for (const { name } of catalogue.commands) single.push(plain(await call("GetCommand", { name }, key)));
  console.log(
    JSON.stringify({
      catalogue: { ...catalogue, commands: catalogue.commands.map(plain) },
      single,
      missing: await call("GetCommand", { name: "nichts / 無" }, key),
      refused: await call("GetCommand", { name: "if" }, "wrong"),
      keyless: await call("SyncCatalog", {}),
    }),
  );
  client.close();
})();
