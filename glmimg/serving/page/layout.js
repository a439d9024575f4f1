// The token layout as colours: one for each id, always the same, as `glmimg tokens show` draws it.

export function ids(part, codebook) {
  const bytes = Uint8Array.from(atob(part.ids), (one) => one.charCodeAt(0));
  const view = new DataView(bytes.buffer), wide = codebook > 65536;
  const [rows, columns] = part.grid;
  return Array.from({ length: rows }, (_, y) =>
    Array.from({ length: columns }, (_, x) => {
      const at = y * columns + x;
      return wide ? view.getUint32(4 * at, true) : view.getUint16(2 * at, true);
    }));
}

function colour(id) {
  let mixed = Math.imul(id + 1, 2654435761) >>> 0;
  mixed = Math.imul((mixed ^ (mixed >>> 15)) >>> 0, 2246822519) >>> 0;
  return [24, 16, 8].map((shift) => 40 + Math.floor((((mixed >>> shift) & 255) * 200) / 255));
}

// `rows` of ids, -1 where nothing is drawn yet.
export function draw(canvas, rows) {
  canvas.height = rows.length;
  canvas.width = rows[0].length;
  const context = canvas.getContext("2d");
  rows.forEach((row, y) => row.forEach((id, x) => {
    if (id < 0) return;
    context.fillStyle = `rgb(${colour(id).join(",")})`;
    context.fillRect(x, y, 1, 1);
  }));
}
