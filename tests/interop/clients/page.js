// What the npm clients do on a test's page: publish the camera, or watch. Each resolves to what the test looks at.
import { WHIPClient as Eyevinn } from "@eyevinn/whip-web-client";
import { WHEPClient } from "whip-whep/whep.js";
import { WHIPClient } from "whip-whep/whip.js";

const NO_SERVERS = { iceServers: [] };

const camera = () => navigator.mediaDevices.getUserMedia({ video: { width: 320, height: 240 }, audio: true });

const connected = (pc) =>
  new Promise((resolve, reject) => {
    const look = () => {
      if (pc.connectionState === "connected") resolve();
      if (pc.connectionState === "failed") reject(new Error("the connection failed"));
    };
    pc.addEventListener("connectionstatechange", look);
    look();
  });

const leaving = [];

/** End everything by the clients' own DELETE. */
window.leave = async () => {
  for (const leave of leaving.splice(0).reverse()) await leave();
};

/** Publish by whip-whep. */
window.publishMedooze = async (url, token) => {
  const pc = new RTCPeerConnection(NO_SERVERS);
  for (const track of (await camera()).getTracks()) pc.addTransceiver(track, { direction: "sendonly" });
  const client = new WHIPClient();
  await client.publish(pc, url, token);
  leaving.push(() => client.stop());
  await connected(pc);
};

/** Publish by @eyevinn/whip-web-client. */
window.publishEyevinn = async (url, token) => {
  const client = new Eyevinn({ endpoint: url, opts: { ...NO_SERVERS, authkey: token } });
  await client.setIceServersFromEndpoint();
  await client.ingest(await camera());
  leaving.push(() => client.destroy());
  await connected(client.peer);
};

/** Watch by whip-whep until `count` pictures were shown and sound has come. */
window.watchMedooze = async (url, token, count) => {
  const pc = new RTCPeerConnection(NO_SERVERS);
  pc.addTransceiver("audio", { direction: "recvonly" });
  pc.addTransceiver("video", { direction: "recvonly" });
  const video = document.querySelector("video");
  const stream = new MediaStream();
  pc.ontrack = (event) => stream.addTrack(event.track);
  video.srcObject = stream;
  const client = new WHEPClient();
  await client.view(pc, url, token);
  leaving.push(() => client.stop());
  for (let shown = 0; shown < count; shown++) await new Promise((next) => video.requestVideoFrameCallback(next));
  for (;;) {
    for (const report of (await pc.getStats()).values())
      if (report.type === "inbound-rtp" && report.kind === "audio" && report.packetsReceived > 20)
        return [video.videoWidth, video.videoHeight];
    await new Promise((next) => setTimeout(next, 100));
  }
};
