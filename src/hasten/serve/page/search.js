/* The search of `hasten methods` (registry.search): every word somewhere in an entry, best places first. */

const escapedWord = (word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

/** The texts a field holds, in lower case: of lists their items, of objects keys and values. */
function fieldTexts(value) {
  if (value === null || value === undefined || value === "") return [];
  if (Array.isArray(value)) return value.flatMap(fieldTexts);
  if (typeof value === "object") return Object.entries(value).flat().flatMap(fieldTexts);
  return [String(value).toLowerCase()];
}

/** What the best place of a word in an entry is worth, 0 where it is not found; `field=value` asks for exactly this. */
function hitWorth(entry, word, weights) {
  const at = word.indexOf("=");
  if (at >= 0 && !(word.slice(0, at) in entry)) return 0;
  if (at >= 0) {
    const held = fieldTexts(entry[word.slice(0, at)]);
    return (held.length ? held : ["none"]).includes(word.slice(at + 1)) ? 1 : 0;
  }
  const whole = new RegExp(`(?<![a-z0-9])${escapedWord(word)}(?![a-z0-9])`);
  let best = 0;
  for (const [name, weight] of Object.entries(weights))
    for (const text of fieldTexts(entry[name])) if (text.includes(word)) best = Math.max(best, weight * (text === word ? 3 : whole.test(text) ? 2 : 1));
  return best;
}

/** The entries in which every word of the query is found, best first; in their own order where equally good. */
export function findMethods(entries, query, weights) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const scored = entries.map((entry) => ({ entry, hits: words.map((word) => hitWorth(entry, word, weights)) })).filter(({ hits }) => hits.every(Boolean));
  const score = ({ hits }) => hits.reduce((sum, one) => sum + one, 0);
  return scored.sort((a, b) => score(b) - score(a)).map(({ entry }) => entry);
}
