// Keeps two connections open with grpc-js, as a client that pings every 10 seconds: node pings.js HOST:PORT SECONDS.
// One connection holds a health Watch, the other has no call. Prints how often each was lost, as JSON.
"use strict";
const grpc = require("@grpc/grpc-js");

const [target, seconds] = process.argv.slice(2);
const options = {
  "grpc.keepalive_time_ms": 10000,
  "grpc.keepalive_timeout_ms": 5000,
  "grpc.keepalive_permit_without_calls": 1,
  "grpc.use_local_subchannel_pool": 1,
};
const same = (octets) => octets;
const connect = () => new grpc.Client(target, grpc.credentials.createInsecure(), options);
const check = (client) =>
  new Promise((resolve, reject) =>
    client.makeUnaryRequest("/grpc.health.v1.Health/Check", same, same, Buffer.alloc(0), (error, answer) =>
      error ? reject(error) : resolve(answer),
    ),
  );

(async () => {
  const until = Date.now() + 1000 * Number(seconds);
  const lost = { idle: 0, watching: 0 };
  const idle = connect();
  const watching = connect();
  await check(idle);
  await check(watching);

  const follow = (state) =>
    idle.getChannel().watchConnectivityState(state, until, (error) => {
      if (error) return; // the time is over
      const now = idle.getChannel().getConnectivityState(true);
      if (state === grpc.connectivityState.READY) lost.idle++;
      follow(now);
    });
  follow(grpc.connectivityState.READY);

  let over = false;
  const watch = () => {
    const stream = watching.makeServerStreamRequest("/grpc.health.v1.Health/Watch", same, same, Buffer.alloc(0));
    stream.on("data", () => {});
    stream.on("error", () => {
      if (over) return;
      lost.watching++;
      setTimeout(watch, 100);
    });
    setTimeout(() => { over = true; stream.cancel(); }, until - Date.now());
  };
  watch();
  setTimeout(() => {
    console.log(JSON.stringify(lost));
    process.exit(0);
  }, until - Date.now() + 200);
})();
