// Names without hashes, so that a build gives the same files, which are checked in.
export default {
  base: "./",
  build: {
    outDir: "../abl_mlx/studio/static",
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: false,
    rollupOptions: {
      output: {
        entryFileNames: "studio.js",
        chunkFileNames: "[name].js",
        assetFileNames: "studio[extname]",
      },
    },
  },
};
