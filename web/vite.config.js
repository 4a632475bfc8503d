import { defineConfig } from "vite";

export default defineConfig({
  base: "./", // works in any folder of any server
  build: { target: "es2023", chunkSizeWarningLimit: 1500 },
  test: { include: ["tests/**/*.test.js"] },
});
