// The page of `abl-mlx publish`. Names without hashes, as in vite.config.js. llama.cpp itself, in
// WebAssembly, is packed by `python -m tools.wllama`.
export default {
  root: "site",
  base: "./",
  build: {
    outDir: "../../abl_mlx/reports/site",
    emptyOutDir: false,
    assetsInlineLimit: 0,
    modulePreload: false,
    rollupOptions: {
      output: { entryFileNames: "site.js", assetFileNames: "site[extname]" },
    },
  },
};
