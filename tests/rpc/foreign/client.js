// A client in another language, by reflection alone: no proto file, no generated code.
//
//   node client.js HOST:PORT        prints one JSON object; grpc-js and grpc-js-reflection-client on NODE_PATH
"use strict";
const grpc = require("@grpc/grpc-js");
const { GrpcReflection } = require("grpc-js-reflection-client");

const SERVICE = "maskwire.v1.TrainingService";

async function main(target) {
  const credentials = grpc.credentials.createInsecure();
  const reflection = new GrpcReflection(target, credentials);
  const descriptor = await reflection.getDescriptorBySymbol(SERVICE);
  const loaded = descriptor.getPackageObject({ keepCase: true, longs: Number, enums: String, defaults: false });
  const client = new loaded.maskwire.v1.TrainingService(target, credentials);
  const call = (method, request) =>
    new Promise((resolve, reject) => {
      const deadline = Date.now() + 30000;
      client[method](request, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer)));
    });
  const refusal = async (method, request) => {
    try {
      await call(method, request);
      return "accepted";
    } catch (error) {
      return { code: grpc.status[error.code], details: error.details };
    }
  };
  const data = Buffer.from(Array.from({ length: 64 }, (_, i) => i % 16));
  const batch = { data, shape: [4, 16], dtype: "DATA_TYPE_UINT8" };
  const steps = [];
  for (let i = 0; i < 3; i++) steps.push(await call("TrainStep", { batch, request_id: `node-${i}` }));
  const again = await call("TrainStep", { batch, request_id: "node-0" });
  const evaluation = await call("EvalLoss", { batch, draws: 4 });
  const saved = await call("Checkpoint", { name: "from-node", request_id: "node-save" });
  const status = await call("GetStatus", {});
  const listed = await call("ListSteps", { first_step: steps[0].step, last_step: steps[2].step, page_size: 2 });
  const chunks = await new Promise((resolve, reject) => {
    const found = [];
    client.DownloadCheckpoint({ name: "from-node", weights_only: true })
      .on("data", (chunk) => found.push(chunk.file.name))
      .on("end", () => resolve(found))
      .on("error", reject);
  });
  const wrong = {
    mask_id: await refusal("TrainStep", { batch: { ...batch, data: Buffer.alloc(64, 16) } }),
    size: await refusal("TrainStep", { batch: { ...batch, data: Buffer.alloc(3) } }),
    dtype: await refusal("TrainStep", { batch: { ...batch, dtype: 0 } }),
    payload: await refusal("TrainStep", { batch: { ...batch, shape: [8, 8] }, request_id: "node-0" }),
    taken: await refusal("Checkpoint", { name: "from-node", request_id: "another" }),
    restore: await refusal("RestoreCheckpoint", { name: "nothing" }),
    far: await refusal("TrainStep", { batch, step: 1000 }),
  };
  console.log(JSON.stringify({
    losses: steps.map((step) => step.losses), steps: steps.map((step) => step.step), replayed: again.replayed,
    same: again.losses.loss === steps[0].losses.loss, evaluation: evaluation.nats_per_token,
    listed: listed.steps.map((step) => [step.step, step.losses.loss]), more: Boolean(listed.next_page_token),
    saved: saved.checkpoint.name, state: status.state, chunks, wrong,
  }));
  client.close();
}

main(process.argv[2]).then(() => process.exit(0), (error) => { console.error(error); process.exit(1); });
