// The routes of openapi.json as a page.

const theme = localStorage.getItem("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.documentElement.dataset.theme = theme;
const spec = await (await fetch("openapi.json")).json();
const resolved = (schema) => (schema.$ref ? spec.components.schemas[schema.$ref.split("/").pop()] : schema);
const node = (name, text) => Object.assign(document.createElement(name), { textContent: text });

function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.filter((one) => one.type !== "null").map(kind).join(" or ");
  if (schema.enum) return schema.enum.join(", ");
  if (schema.const) return schema.const;
  if (schema.type === "array") return `list of ${kind(schema.items || {})}`;
  const bounds = [schema.minimum ?? schema.exclusiveMinimum, schema.maximum ?? schema.exclusiveMaximum];
  return (schema.type || "any") + (bounds.some((one) => one !== undefined) ? ` ${bounds.map((one) => one ?? "").join("..")}` : "");
}

function fields(schema) {
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const title of ["field", "kind", "default", "meaning"]) head.append(node("th", title));
  for (const [name, one] of Object.entries(resolved(schema).properties || {})) {
    const row = table.insertRow();
    const needed = (resolved(schema).required || []).includes(name);
    const usual = one.default === undefined || one.default === null ? "" : JSON.stringify(one.default);
    for (const text of [name, kind(one), needed ? "needed" : usual, one.description || ""]) row.insertCell().textContent = text;
  }
  return table;
}

const place = document.getElementById("routes");
place.replaceChildren();
for (const [path, methods] of Object.entries(spec.paths)) {
  for (const [method, route] of Object.entries(methods)) {
    const article = document.createElement("article");
    article.append(node("h2", `${method.toUpperCase()} ${path}`), node("p", route.description || route.summary));
    for (const body of Object.values(route.requestBody?.content || {})) article.append(fields(body.schema));
    place.append(article);
  }
}
