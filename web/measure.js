// What the page measures: the server's clock, frames shown, and the way of a frame from camera to screen.
// All instants are milliseconds on the page's clock (performance.now) unless a name says otherwise.

const CLOCK_WINDOW_MS = 30_000;
const KEEP_MS = 120_000;
const MAX_UNMATCHED = 600;
// aiortc may round a timestamp by one 90 kHz tick when it re-bases VP8.
const RTP_SLACK = [0, 1, -1];

/** @param {number[]} values @param {number} share @returns {number | null} */
export function quantile(values, share) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

/** @param {number[]} values @returns {number | null} */
export function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

/** Maps the server's clock to the page's: the ping with the smallest round trip of the last 30 s is trusted. */
export class ClockMap {
  /** @type {{at: number, rtt: number, offset: number}[]} */
  #samples = [];

  /** @param {number} sentMs @param {number} receivedMs @param {number} serverS */
  add(sentMs, receivedMs, serverS) {
    const rtt = receivedMs - sentMs;
    this.#samples = this.#samples.filter((sample) => sample.at > receivedMs - CLOCK_WINDOW_MS);
    this.#samples.push({ at: receivedMs, rtt, offset: sentMs + rtt / 2 - serverS * 1000 });
  }

  get #best() {
    return this.#samples.reduce((best, sample) => (best && best.rtt <= sample.rtt ? best : sample), null);
  }

  /** Smallest recent round trip, or null before the first pong. */
  get rttMs() {
    return this.#best?.rtt ?? null;
  }

  /** @param {number} serverS @returns {number | null} the same instant on the page's clock */
  toPage(serverS) {
    const best = this.#best;
    return best ? serverS * 1000 + best.offset : null;
  }
}

/**
 * One shown frame whose mark has come: where its time went, in ms.
 * @typedef {{shownAt: number, latency: number, uplink: number, server: number, downlink: number, display: number,
 *            index: number, kind: number}} Way
 */

/** Joins the server's frame marks with the frames that the remote video really showed. */
export class FrameMeter {
  /** @type {Map<number, {shownAt: number, receivedAt: number}>} frames shown, by RTP timestamp */
  #shown = new Map();
  /** @type {Map<number, [number, number, number, number, number]>} marks whose frame is not shown yet */
  #marks = new Map();
  /** @type {Way[]} */
  #ways = [];
  /** @type {{at: number, presented: number}[]} */
  #presented = [];
  #framesShown = 0;
  #restyledShown = 0;
  #firstRestyledAt = null;
  #lastIndex = null;
  #clock;
  #encodeMs = 0;

  /** @param {ClockMap} clock */
  constructor(clock) {
    this.#clock = clock;
  }

  /** Mean encode time of the uplink; part of the uplink share. @param {number} ms */
  set encodeMs(ms) {
    this.#encodeMs = ms;
  }

  get encodeMs() {
    return this.#encodeMs;
  }

  get framesShown() {
    return this.#framesShown;
  }

  get restyledShown() {
    return this.#restyledShown;
  }

  /** When the first restyled picture was on the screen, or null. */
  get firstRestyledAt() {
    return this.#firstRestyledAt;
  }

  /** Server's index of the newest frame that is known to have been shown, or null. */
  get lastIndex() {
    return this.#lastIndex;
  }

  /** Longest time between two shown frames in the last seconds, in ms; a standstill counts. */
  largestGapMs(now, windowS) {
    const times = this.#presented.map((shown) => shown.at).filter((at) => at > now - windowS * 1000);
    return times.length ? Math.max(...times.map((at, i) => (times[i + 1] ?? now) - at)) : null;
  }

  /**
   * A frame of the remote video was presented (requestVideoFrameCallback).
   * @param {number} now @param {VideoFrameCallbackMetadata} metadata
   */
  onFrame(now, metadata) {
    const last = this.#presented.at(-1);
    if (last && metadata.presentedFrames < last.presented) this.#presented = [];
    this.#framesShown += last && metadata.presentedFrames > last.presented ? metadata.presentedFrames - last.presented : 1;
    this.#presented.push({ at: now, presented: metadata.presentedFrames });
    while (this.#presented[0].at < now - KEEP_MS) this.#presented.shift();
    if (metadata.rtpTimestamp === undefined) return;
    const shownAt = metadata.expectedDisplayTime ?? metadata.presentationTime;
    this.#shown.set(metadata.rtpTimestamp, { shownAt, receivedAt: metadata.receiveTime ?? shownAt });
    trim(this.#shown);
    this.#join(metadata.rtpTimestamp);
  }

  /** Marks of the server: rows of [rtp_timestamp, frame_index, arrived_at_s, released_at_s, kind]. */
  onMarks(rows) {
    for (const row of rows) {
      this.#marks.set(row[0], row);
      for (const slack of RTP_SLACK) if (this.#join(row[0] + slack)) break;
    }
    trim(this.#marks);
  }

  /** @param {number} rtp timestamp of a shown frame @returns {boolean} */
  #join(rtp) {
    const shown = this.#shown.get(rtp);
    const key = RTP_SLACK.map((slack) => rtp + slack).find((candidate) => this.#marks.has(candidate));
    if (!shown || key === undefined) return false;
    const [, index, arrivedS, releasedS, kind] = this.#marks.get(key);
    const arrivedAt = this.#clock.toPage(arrivedS);
    this.#shown.delete(rtp);
    this.#marks.delete(key);
    this.#lastIndex = Math.max(index, this.#lastIndex ?? 0);
    if (kind === 1) {
      this.#restyledShown += 1;
      this.#firstRestyledAt ??= shown.shownAt;
    }
    if (arrivedAt === null) return true;
    const releasedAt = this.#clock.toPage(releasedS);
    const uplink = this.#clock.rttMs / 2 + this.#encodeMs;
    this.#ways.push({
      shownAt: shown.shownAt,
      latency: shown.shownAt - arrivedAt + uplink,
      uplink,
      server: releasedAt - arrivedAt,
      downlink: shown.receivedAt - releasedAt,
      display: shown.shownAt - shown.receivedAt,
      index,
      kind,
    });
    while (this.#ways[0].shownAt < shown.shownAt - KEEP_MS) this.#ways.shift();
    return true;
  }

  /** Frames shown a second, over the last `windowMs`. @param {number} now @param {number} windowMs */
  fps(now, windowMs) {
    if (this.#presented.length < 2) return null;
    const recent = this.#presented.filter((shown) => shown.at > now - windowMs);
    if (recent.length < 2) return 0;
    const [first, last] = [recent[0], recent.at(-1)];
    // A picture that stands still counts as time without frames.
    const span = Math.max(last.at, now - 250) - first.at;
    return span > 0 ? ((last.presented - first.presented) * 1000) / span : null;
  }

  /** @param {number} now @param {number} windowS @returns {{p50: number | null, p95: number | null, frames: number}} */
  latency(now, windowS) {
    const values = this.#recent(now, windowS).map((way) => way.latency);
    return { p50: quantile(values, 0.5), p95: quantile(values, 0.95), frames: values.length };
  }

  /** Mean share of each leg over the last seconds, in ms; they add up to `latency`. */
  budget(now, windowS) {
    const ways = this.#recent(now, windowS);
    const leg = (name) => mean(ways.map((way) => way[name]));
    const names = ["latency", "uplink", "server", "downlink", "display"];
    return ways.length ? Object.fromEntries(names.map((name) => [name, leg(name)])) : null;
  }

  #recent(now, windowS) {
    // The camera passing through is faster than a painted picture: what is shown now counts, not what was.
    const kind = this.#ways.at(-1)?.kind;
    return this.#ways.filter((way) => way.kind === kind && way.shownAt > now - windowS * 1000);
  }
}

function trim(map) {
  while (map.size > MAX_UNMATCHED) map.delete(map.keys().next().value);
}

/** Reads what the browser knows about the media legs, once a second. */
export class MediaProbe {
  #pc;
  #last = { encoded: 0, encodeTime: 0 };

  /** @param {RTCPeerConnection} pc */
  constructor(pc) {
    this.#pc = pc;
  }

  /** @returns {Promise<{encodeMs: number | null, sent: string, codec: string, heldBy: string, freezes: number, lost: number}>} */
  async read() {
    const report = await this.#pc.getStats();
    const out = { encodeMs: null, sent: "", codec: "", heldBy: "", freezes: 0, lost: 0 };
    for (const entry of report.values()) {
      if (entry.type === "outbound-rtp" && entry.kind === "video") this.#readOutbound(entry, report, out);
      if (entry.type === "inbound-rtp" && entry.kind === "video") {
        out.freezes = entry.freezeCount ?? 0;
        out.lost = entry.packetsLost ?? 0;
      }
    }
    return out;
  }

  #readOutbound(entry, report, out) {
    const { framesEncoded: encoded = 0, totalEncodeTime: encodeTime = 0 } = entry;
    const frames = encoded - this.#last.encoded;
    if (frames > 0) out.encodeMs = ((encodeTime - this.#last.encodeTime) / frames) * 1000;
    this.#last = { encoded, encodeTime };
    if (entry.frameWidth) out.sent = `${entry.frameWidth}x${entry.frameHeight}`;
    out.codec = (report.get(entry.codecId)?.mimeType ?? "").replace("video/", "");
    out.heldBy = entry.qualityLimitationReason ?? "";
  }
}
