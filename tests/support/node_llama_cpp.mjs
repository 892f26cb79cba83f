// Opens GGUFs in node-llama-cpp and continues tokens greedily; one line of JSON for each.
//
//     node node_llama_cpp.mjs FOLDER '[{"path": ..., "tokens": [...], "count": 16, "lora": ...}]'
//
// FOLDER is where `npm install node-llama-cpp` was run. Without tokens only the header is read.

import path from "node:path";

const [folder, jobs] = process.argv.slice(2);
const place = path.join(folder, "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama, readGgufFileInfo} = await import(place);

const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});

async function answer({path, tokens, count, lora}) {
    const info = await readGgufFileInfo(path);
    const said = {
        type: info.metadata.general?.type ?? null,
        architecture: info.metadata.general.architecture,
        tensors: Number(info.totalTensorCount)
    };
    if (!tokens)
        return said;
    const model = await llama.loadModel({modelPath: path});
    const context = await model.createContext({contextSize: 256, threads: 1, ...(lora ? {lora} : {})});
    const found = [];
    for await (const token of context.getSequence().evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
        found.push(token);
        if (found.length >= count)
            break;
    }
    await context.dispose();
    await model.dispose();
    return {...said, tokens: found};
}

for (const job of JSON.parse(jobs)) {
    try {
        console.log(JSON.stringify(await answer(job)));
    } catch (error) {
        console.log(JSON.stringify({error: String(error?.message ?? error)}));
    }
}
process.exit(0);
