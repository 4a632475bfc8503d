// Keeps the page usable without a network: fresh from the server where there is one, else as kept.

const PAGE = self.registration.scope;
const KEPT = `grimace ${PAGE}`; // a server may hold several, each in a folder of its own

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

// The page names what it loaded, and what may be chosen later; it is told what cannot be kept.
self.addEventListener("message", (event) => {
  event.waitUntil(keep(event.data).then((missing) => event.ports[0].postMessage(missing)));
});

async function keep(urls) {
  const cache = await caches.open(KEPT);
  await Promise.allSettled(urls.map((url) => cache.add(url))); // one missing spoils no other
  const wanted = new Set(urls);
  for (const request of await cache.keys()) if (!wanted.has(request.url)) await cache.delete(request);
  const kept = await Promise.all(urls.map((url) => cache.match(url))); // now, or when there was a network
  return urls.filter((_, i) => !kept[i]);
}

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && request.url.startsWith(PAGE)) event.respondWith(fresh(request));
});

async function fresh(request) {
  try {
    return await fetch(request);
  } catch (error) {
    const cache = await caches.open(KEPT);
    // It is one page, under whichever name: "…/" or "…/index.html".
    const wanted = request.mode === "navigate" ? PAGE : request;
    const kept = await cache.match(wanted, { ignoreSearch: true });
    if (kept) return kept;
    throw error;
  }
}
