// Finished pictures, kept in this browser.

const KEEP = 60;

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("glmimg", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function run(mode, work) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction("pictures", mode);
      const request = work(transaction.objectStore("pictures"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

export const all = () => run("readonly", (store) => store.getAll());
export const forget = () => run("readwrite", (store) => store.clear());

export async function keep(entry) {
  await run("readwrite", (store) => store.add(entry));
  const entries = await all();
  for (const old of entries.slice(0, Math.max(0, entries.length - KEEP))) {
    await run("readwrite", (store) => store.delete(old.id));
  }
}
